"""Nearest upsampling and convolution against strided convolution with dropout: the speed-optimised Fashion-MNIST DCGAN."""

from torch import nn

from frugan.config.architectures import Upsample
from frugan.gan.networks.blocks import Block, Dropout, Head, Network, norm, radford_init, widths
from frugan.gan.networks.convolutions import Conv2d
from frugan.gan.networks.generators import nearest_generator


def build(options: Upsample, image_size: int, channels: int) -> tuple[Network, Network]:
    """Both networks; see `frugan.gan.networks.build`."""
    sizes = options.sizes(image_size)
    generator = nearest_generator(options.latent_dim, sizes, options.width_g, channels, options.norm_g)

    blocks, in_channels, size = [], channels, image_size
    kind = options.norm_d
    for i, out in enumerate(reversed(widths(options.width_d, sizes))):
        down = Conv2d(in_channels, out, 4, stride=2, padding=1, bias=kind == "none")
        drop = Dropout(options.dropout, f"down{i}")
        blocks.append(Block(down, *norm(kind, out), nn.LeakyReLU(0.2, inplace=True), drop))
        in_channels, size = out, size // 2
    blocks.append(Head(nn.Flatten(), nn.Linear(in_channels * size**2, 1), nn.Flatten(0)))
    discriminator = Network(*blocks)

    radford_init(generator)
    radford_init(discriminator)
    return generator, discriminator
