"""Generators: a dense layer from noise to the smallest map, then a step to each larger one.

Nearest upsampling before an ordinary convolution avoids the checkerboard of transposed ones (Odena et al. 2016, "Deconvolution and
checkerboard artifacts"). Where ``modulation`` is asked for, each normalisation is followed by a `Modulated` layer.
"""

import torch
from torch import Tensor, nn

from frugan.config.architectures import Norm
from frugan.gan.networks.blocks import Block, Map, Modulated, Network, OfSamples, norm, through, widths
from frugan.gan.networks.convolutions import Conv2d, ConvTranspose2d
from frugan.utils.draws import Rows


def transposed_generator(
    latent_dim: int, sizes: list[int], width: int, channels: int, kind: Norm, *, slope: float = 0.0, modulation: bool = False
) -> Network:
    """A dense layer to the smallest of ``sizes``, then a transposed convolution to each larger one; the last ends in tanh.

    ``slope`` is that of the activations below zero: 0 for ReLU.
    """

    def activation(channels: int) -> nn.Module:
        own = nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)
        return Modulated(latent_dim, channels, own) if modulation else own

    c = widths(width, sizes)
    blocks = [seed_block(latent_dim, c[0], sizes[0], kind, activation(c[0]))]
    for i in range(len(c)):
        last = i + 1 == len(c)
        out = channels if last else c[i + 1]
        kernel = 4 if sizes[i + 1] == 2 * sizes[i] else 3  # 3 gives one pixel less than the double
        up = ConvTranspose2d(c[i], out, kernel, stride=2, padding=1, bias=last or kind == "none")
        blocks.append(Block(up, nn.Tanh()) if last else Block(up, *norm(kind, out), activation(out)))
    return Network(*blocks)


def nearest_generator(
    latent_dim: int, sizes: list[int], width: int, channels: int, kind: Norm, *, modulation: bool = False
) -> Network:  # fmt: skip
    """A dense layer to the smallest of ``sizes``, then nearest upsampling and a convolution to each larger one; ends in tanh."""

    def activation(channels: int) -> nn.Module:
        own = nn.LeakyReLU(0.2, inplace=True)
        return Modulated(latent_dim, channels, own) if modulation else own

    c = widths(width, sizes)
    blocks = [seed_block(latent_dim, c[0], sizes[0], kind, activation(c[0]))]
    for before, out, size in zip(c, [*c[1:], c[-1]], sizes[1:], strict=True):
        conv = Conv2d(before, out, 3, padding=1, bias=kind == "none")
        blocks.append(Block(Resize(size), conv, *norm(kind, out), activation(out)))
    blocks.append(Block(Conv2d(c[-1], channels, 3, padding=1), nn.Tanh()))
    return Network(*blocks)


class Residual(OfSamples):
    """Nearest upsampling, then two 3x3 convolutions beside a 1x1 one: ``[n, before, h, w]`` to ``[n, out, size, size]``.

    Modulated if there is a ``latent_dim``.
    """

    def __init__(self, before: int, out: int, size: int, kind: Norm, latent_dim: int | None = None) -> None:
        super().__init__()
        bias = kind == "none"
        relu = nn.ReLU(inplace=True)
        self.layers = nn.Sequential(
            ResizedConv(before, out, size, bias=bias), *norm(kind, out), Modulated(latent_dim, out, relu) if latent_dim else relu,
            Conv2d(out, out, 3, padding=1, bias=bias), *norm(kind, out), *([Modulated(latent_dim, out)] if latent_dim else []),
        )  # fmt: skip
        # On the smaller map, as a 1x1 convolution commutes with upsampling.
        self.shortcut = nn.Sequential(Conv2d(before, out, 1, bias=False), Resize(size))

    def forward(self, x: Tensor, rows: Rows | None) -> Tensor:
        """As the class says."""
        shortcut: Tensor = self.shortcut(x)
        return shortcut + through(self.layers, x, rows)


def residual_generator(
    latent_dim: int, sizes: list[int], width: int, channels: int, kind: Norm, *, modulation: bool = False
) -> Network:  # fmt: skip
    """A dense layer to the smallest of ``sizes``, then nearest upsampling and a residual block at each larger one; ends in tanh."""
    c = widths(width, sizes)
    relu = nn.ReLU(inplace=True)
    blocks = [seed_block(latent_dim, c[0], sizes[0], kind, Modulated(latent_dim, c[0], relu) if modulation else relu)]
    outs = [*c[1:], max(1, c[-1] // 2)]
    for before, out, size in zip(c, outs, sizes[1:], strict=True):
        residual = Residual(before, out, size, kind, latent_dim if modulation else None)
        blocks.append(Block(residual, nn.ReLU(inplace=True)))
    return Network(*blocks, Block(Conv2d(outs[-1], channels, 3, padding=1), nn.Tanh()))


GENERATORS = {"transposed": transposed_generator, "nearest": nearest_generator, "residual": residual_generator}


def seed_block(latent_dim: int, channels: int, size: int, kind: Norm, activation: nn.Module) -> Block:
    """Noise ``[n, latent_dim]`` to a first feature map ``[n, channels, size, size]``."""
    dense = nn.Linear(latent_dim, channels * size * size, bias=kind == "none")
    return Block(dense, Map(channels, size), *norm(kind, channels), activation)


class Resize(nn.Module):
    """Nearest upsampling to ``size``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """``[n, c, h, w]`` to ``[n, c, size, size]``."""
        return enlarged(x, self.size)


def enlarged(x: Tensor, size: int) -> Tensor:
    """Nearest upsampling of maps ``[n, c, h, h]`` to ``[n, c, size, size]``."""
    if x.device.type == "xla" and 2 * x.shape[-1] - size in (0, 1):  # its own is for TPUs alone, and elsewhere the host's
        n, c, h, w = x.shape
        return x[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)[:, :, :size, :size]
    if x.device.type == "cuda":  # whose autocast would make float32 of what is only copied
        with torch.autocast("cuda", enabled=False):
            return nn.functional.interpolate(x, size=(size, size))
    return nn.functional.interpolate(x, size=(size, size))


class ResizedConv(nn.Conv2d):
    """Nearest upsampling to ``size`` and a 3x3 convolution, ``[n, before, h, w]`` to ``[n, out, size, size]``.

    Where that doubles the size, both are one transposed convolution by 2 with a 4x4 kernel, each of whose numbers is the sum of
    those that meet the same pixel: equal but for rounding, with 4/9 of the arithmetic.
    """

    def __init__(self, before: int, out: int, size: int, *, bias: bool) -> None:
        super().__init__(before, out, 3, padding=1, bias=bias)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        if 2 * x.shape[-1] != self.size or 2 * x.shape[-2] != self.size:
            return super().forward(enlarged(x, self.size))
        kernel = _doubled(_doubled(self.weight, 2), 3).transpose(0, 1)
        return nn.functional.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


def _doubled(weight: Tensor, dim: int) -> Tensor:
    first, second, third = weight.unbind(dim)
    return torch.stack([third, second + third, first + second, first], dim)
