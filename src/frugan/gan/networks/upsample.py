"""Nearest upsampling and convolution against strided convolution with dropout: the speed-optimised Fashion-MNIST DCGAN.

Upsampling before an ordinary convolution avoids the checkerboard of transposed ones (Odena et al. 2016).
"""

from torch import nn

from frugan.config.architectures import Norm, Upsample
from frugan.gan.networks.blocks import Block, Dropout, Head, Network, Resize, norm, radford_init, seed_block, widths


def nearest_generator(latent_dim: int, sizes: list[int], width: int, channels: int, kind: Norm) -> Network:
    """A dense layer to the smallest of ``sizes``, then nearest upsampling and a convolution to each larger one; ends in tanh."""
    c = widths(width, sizes)
    blocks = [seed_block(latent_dim, c[0], sizes[0], kind, nn.LeakyReLU(0.2, inplace=True))]
    for before, out, size in zip(c, [*c[1:], c[-1]], sizes[1:], strict=True):
        conv = nn.Conv2d(before, out, 3, padding=1, bias=kind == "none")
        blocks.append(Block(Resize(size), conv, *norm(kind, out), nn.LeakyReLU(0.2, inplace=True)))
    blocks.append(Block(nn.Conv2d(c[-1], channels, 3, padding=1), nn.Tanh()))
    return Network(*blocks)


def build(options: Upsample, image_size: int, channels: int) -> tuple[Network, Network]:
    """Both networks; see `frugan.gan.networks.build`."""
    sizes = options.sizes(image_size)
    generator = nearest_generator(options.latent_dim, sizes, options.width_g, channels, options.norm_g)

    blocks, in_channels, size = [], channels, image_size
    kind = options.norm_d
    for i, out in enumerate(reversed(widths(options.width_d, sizes))):
        down = nn.Conv2d(in_channels, out, 4, stride=2, padding=1, bias=kind == "none")
        drop = Dropout(options.dropout, f"down{i}")
        blocks.append(Block(down, *norm(kind, out), nn.LeakyReLU(0.2, inplace=True), drop))
        in_channels, size = out, size // 2
    blocks.append(Head(nn.Flatten(), nn.Linear(in_channels * size**2, 1), nn.Flatten(0)))
    discriminator = Network(*blocks)

    radford_init(generator)
    radford_init(discriminator)
    return generator, discriminator
