"""Generators: a dense layer from noise to the smallest map, then a step to each larger one.

Nearest upsampling before an ordinary convolution avoids the checkerboard of transposed ones (Odena et al. 2016, "Deconvolution and
checkerboard artifacts").
"""

from torch import Tensor, nn

from frugan.config.architectures import Norm
from frugan.gan.networks.blocks import Block, Network, Resize, ResizedConv, norm, seed_block, widths
from frugan.gan.networks.convolutions import Conv2d, ConvTranspose2d


def transposed_generator(latent_dim: int, sizes: list[int], width: int, channels: int, kind: Norm, slope: float = 0.0) -> Network:
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
        up = ConvTranspose2d(c[i], out, kernel, stride=2, padding=1, bias=last or kind == "none")
        blocks.append(Block(up, nn.Tanh()) if last else Block(up, *norm(kind, out), activation()))
    return Network(*blocks)


def nearest_generator(latent_dim: int, sizes: list[int], width: int, channels: int, kind: Norm) -> Network:
    """A dense layer to the smallest of ``sizes``, then nearest upsampling and a convolution to each larger one; ends in tanh."""
    c = widths(width, sizes)
    blocks = [seed_block(latent_dim, c[0], sizes[0], kind, nn.LeakyReLU(0.2, inplace=True))]
    for before, out, size in zip(c, [*c[1:], c[-1]], sizes[1:], strict=True):
        conv = Conv2d(before, out, 3, padding=1, bias=kind == "none")
        blocks.append(Block(Resize(size), conv, *norm(kind, out), nn.LeakyReLU(0.2, inplace=True)))
    blocks.append(Block(Conv2d(c[-1], channels, 3, padding=1), nn.Tanh()))
    return Network(*blocks)


class Residual(nn.Module):
    """Nearest upsampling, then two 3x3 convolutions beside a 1x1 one: ``[n, before, h, w]`` to ``[n, out, size, size]``."""

    def __init__(self, before: int, out: int, size: int, kind: Norm) -> None:
        super().__init__()
        bias = kind == "none"
        self.layers = nn.Sequential(
            ResizedConv(before, out, size, bias=bias), *norm(kind, out), nn.ReLU(inplace=True),
            Conv2d(out, out, 3, padding=1, bias=bias), *norm(kind, out),
        )  # fmt: skip
        # On the smaller map, as a 1x1 convolution commutes with upsampling.
        self.shortcut = nn.Sequential(Conv2d(before, out, 1, bias=False), Resize(size))

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        shortcut: Tensor = self.shortcut(x)
        residue: Tensor = self.layers(x)
        return shortcut + residue


def residual_generator(latent_dim: int, sizes: list[int], width: int, channels: int, kind: Norm) -> Network:
    """A dense layer to the smallest of ``sizes``, then nearest upsampling and a residual block at each larger one; ends in tanh."""
    c = widths(width, sizes)
    blocks: list[Block] = [seed_block(latent_dim, c[0], sizes[0], kind, nn.ReLU(inplace=True))]
    outs = [*c[1:], max(1, c[-1] // 2)]
    for before, out, size in zip(c, outs, sizes[1:], strict=True):
        blocks.append(Block(Residual(before, out, size, kind), nn.ReLU(inplace=True)))
    return Network(*blocks, Block(Conv2d(outs[-1], channels, 3, padding=1), nn.Tanh()))


GENERATORS = {"transposed": transposed_generator, "nearest": nearest_generator, "residual": residual_generator}
