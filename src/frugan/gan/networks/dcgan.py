"""DCGAN: transposed convolutions against strided ones (Radford et al. 2015, arXiv 1511.06434), for any image size."""

from torch import nn

from frugan.config.architectures import Dcgan, Norm
from frugan.gan.networks.blocks import Average, Block, Head, Network, norm, radford_init, seed_block, widths


def transposed_generator(latent_dim: int, sizes: list[int], width: int, channels: int, kind: Norm, slope: float) -> Network:
    """A dense layer to the smallest of ``sizes``, then a transposed convolution to each larger one; the last ends in tanh.

    ``slope`` is that of the activations below zero: 0 for ReLU.
    """

    def activation() -> nn.Module:
        return nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)

    c = widths(width, sizes)
    blocks = [seed_block(latent_dim, c[0], sizes[0], kind, activation())]
    for i in range(len(c)):
        last = i + 1 == len(c)
        out = channels if last else c[i + 1]
        kernel = 4 if sizes[i + 1] == 2 * sizes[i] else 3  # 3 gives one pixel less than the double
        up = nn.ConvTranspose2d(c[i], out, kernel, stride=2, padding=1, bias=last or kind == "none")
        blocks.append(Block(up, nn.Tanh()) if last else Block(up, *norm(kind, out), activation()))
    return Network(*blocks)


def build(options: Dcgan, image_size: int, channels: int) -> tuple[Network, Network]:
    """Both networks; see `frugan.gan.networks.build`."""
    sizes = options.sizes(image_size)
    generator = transposed_generator(options.latent_dim, sizes, options.width_g, channels, options.norm_g, slope=0.0)

    blocks, before, size = [], channels, image_size
    for i, out in enumerate(reversed(widths(options.width_d, sizes))):
        kind: Norm = options.norm_d if i else "none"
        down = nn.Conv2d(before, out, 4, stride=2, padding=1, bias=kind == "none")
        blocks.append(Block(down, *norm(kind, out), nn.LeakyReLU(0.2, inplace=True)))
        before, size = out, size // 2
    grid = min(4, size)
    blocks.append(Head(Average(grid), nn.Conv2d(before, 1, grid), nn.Flatten(0)))
    discriminator = Network(*blocks)

    radford_init(generator)
    radford_init(discriminator)
    return generator, discriminator
