"""R3GAN's networks: residual, free of normalisation, symmetric (Huang et al. 2024, arXiv 2501.05441, section 4 and figure 4).

Each image size has residual blocks of 1x1, grouped 3x3 and 1x1 convolutions; sizes change by bilinear resampling with a 1x1
convolution. The generator begins, and the discriminator ends, with a learned basis over the smallest map. Stability comes
from the initialisation (Fixup, Zhang et al. 2019): the last convolution of each block starts at zero and the others are
scaled by (number of blocks)^-1/4.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from frugan.config.architectures import R3
from frugan.gan.networks.blocks import Average, Block, Head, Network
from frugan.gan.networks.convolutions import Conv2d
from frugan.utils.errors import UserError

SLOPE = 0.2


def _conv(before: int, out: int, kernel: int = 1, *, groups: int = 1, gain: float = 1.0, bias: bool = False) -> nn.Conv2d:
    conv = Conv2d(before, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
    with torch.no_grad():
        if gain:
            nn.init.kaiming_normal_(conv.weight, a=SLOPE)
        conv.weight.mul_(gain)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    return conv


class Residual(nn.Module):
    """``x`` plus what three convolutions make of it; the identity when new."""

    def __init__(self, channels: int, options: R3, gain: float) -> None:
        super().__init__()
        inside = channels * options.expansion
        if inside % options.groups:
            raise UserError(f"--groups {options.groups} does not divide the {inside} channels of a block; change a width or it.")
        self.layers = nn.Sequential(
            _conv(channels, inside, gain=gain, bias=True),
            nn.LeakyReLU(SLOPE, inplace=True),
            _conv(inside, inside, 3, groups=options.groups, gain=gain, bias=True),
            nn.LeakyReLU(SLOPE, inplace=True),
            _conv(inside, channels, gain=0.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[n, c, h, w]`` to the same."""
        residue: Tensor = self.layers(x)
        return x + residue


class Enlarge(nn.Module):
    """Bilinear upsampling to ``size``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """``[n, c, h, w]`` to ``[n, c, size, size]``."""
        if x.device.type == "cuda":
            enlarged: Tensor = Enlarged.apply(x, self.size)
            return enlarged
        if x.device.type == "xla":  # whose own is for TPUs alone, and elsewhere the host's
            down, across = (_weights(n, self.size, x) for n in x.shape[2:])
            return down @ x @ across.T
        return _enlarged(x, self.size)


def _enlarged(x: Tensor, size: int) -> Tensor:
    return nn.functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


class Enlarged(torch.autograd.Function):
    """Bilinear upsampling whose gradient is two products of matrices: that of CUDA's own kernel has other last bits each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        """``[n, c, h, w]`` to ``[n, c, size, size]``."""
        ctx.before, ctx.after = x.shape[2:], size
        return _enlarged(x, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Of ``[n, c, size, size]`` to ``[n, c, h, w]``."""
        down, across = (_weights(n, ctx.after, gradient) for n in ctx.before)
        return down.T @ (gradient @ across), None


def _weights(before: int, after: int, like: Tensor) -> Tensor:
    """The matrix ``[after, before]`` of bilinear upsampling of a line (`torch.nn.functional.interpolate`, not aligned)."""
    place = (
        torch.arange(after, dtype=torch.float32, device=like.device).add_(0.5).mul_(before / after).sub_(0.5).clamp_(0, before - 1)
    )
    apart = (place[:, None] - torch.arange(before, device=like.device)).abs_()
    return (1 - apart).clamp_(min=0).to(like.dtype)


class GenerativeBasis(nn.Module):
    """Noise to weights on learned maps: ``[n, latent_dim]`` to ``[n, channels, size, size]``."""

    def __init__(self, latent_dim: int, channels: int, size: int) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.empty(channels, size, size).normal_())
        self.linear = nn.Linear(latent_dim, channels, bias=False)
        nn.init.normal_(self.linear.weight, 0.0, latent_dim**-0.5)

    def forward(self, z: Tensor) -> Tensor:
        """``[n, latent_dim]`` to ``[n, channels, size, size]``."""
        weights: Tensor = self.linear(z)
        return self.basis * weights[:, :, None, None]


def build(options: R3, image_size: int, channels: int) -> tuple[Network, Network]:
    """Both networks; see `frugan.gan.networks.build`."""
    sizes = options.sizes(image_size)
    doublings = range(len(sizes))
    wide_g = [options.width_g * min(8, 2**i) for i in reversed(doublings)]
    wide_d = [options.width_d * min(8, 2**i) for i in reversed(doublings)]
    gain = (options.blocks * len(sizes)) ** -0.25

    def stage(width: int) -> list[nn.Module]:
        return [Residual(width, options, gain) for _ in range(options.blocks)]

    up = [Block(GenerativeBasis(options.latent_dim, wide_g[0], sizes[0]), *stage(wide_g[0]))]
    for i, size in enumerate(sizes[1:]):
        # The 1x1 convolution goes first: it commutes with resampling and is cheaper on the smaller map.
        up.append(Block(_conv(wide_g[i], wide_g[i + 1]), Enlarge(size), *stage(wide_g[i + 1])))
    up.append(Block(_conv(wide_g[-1], channels)))

    down = [Block(_conv(channels, wide_d[-1]), *stage(wide_d[-1]))]
    for i in range(len(sizes) - 2, -1, -1):
        down.append(Block(Average(sizes[i]), _conv(wide_d[i + 1], wide_d[i]), *stage(wide_d[i])))
    basis = nn.Conv2d(wide_d[0], wide_d[0], sizes[0], groups=wide_d[0], bias=False)
    nn.init.kaiming_normal_(basis.weight, nonlinearity="linear")
    head = nn.Linear(wide_d[0], 1, bias=False)
    nn.init.kaiming_normal_(head.weight, nonlinearity="linear")
    down.append(Head(basis, nn.Flatten(), head, nn.Flatten(0)))
    return Network(*up), Network(*down)
