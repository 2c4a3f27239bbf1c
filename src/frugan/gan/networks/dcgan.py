"""DCGAN: a generator against strided convolutions (Radford et al. 2015, arXiv 1511.06434), for any image size."""

from torch import nn

from frugan.config.architectures import Dcgan, Norm
from frugan.gan.networks.blocks import Block, Head, Mean, Network, norm, radford_init, widths
from frugan.gan.networks.convolutions import Conv2d
from frugan.gan.networks.generators import GENERATORS


def build(options: Dcgan, image_size: int, channels: int) -> tuple[Network, Network]:
    """Both networks; see `frugan.gan.networks.build`."""
    sizes = options.sizes(image_size)
    generator = GENERATORS[options.upsampling](
        options.latent_dim, sizes, options.width_g, channels, options.norm_g, modulation=options.modulation
    )

    blocks, before, size = [], channels, image_size
    for i, out in enumerate(reversed(widths(options.width_d, sizes))):
        kind: Norm = options.norm_d if i else "none"
        down = Conv2d(before, out, 4, stride=2, padding=1, bias=kind == "none")
        blocks.append(Block(down, *norm(kind, out), nn.LeakyReLU(0.2, inplace=True)))
        before, size = out, size // 2
    grid = min(4, size)
    # The identity keeps the names of weights as they were when averaging was a layer.
    blocks.append(Head(nn.Identity(), Mean(before, 1, grid, grid=True), nn.Flatten(0)))
    discriminator = Network(*blocks)

    radford_init(generator)
    radford_init(discriminator)
    return generator, discriminator
