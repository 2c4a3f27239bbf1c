"""Convolutions that are products of matrices where that is much faster than what torch asks, oneDNN or cuDNN (docs/LOG.md).

That is so for maps of one channel, and on a CPU for gradients of kernels in bfloat16 where maps are small. With large maps L
``[n, a, ...]``, small ones S ``[n, b, ...]`` and a kernel K ``[b, a, k, k]`` there are three operations,

    S = down(L, K), the convolution;  L = up(S, K), the transposed one;  K = pair(L, S), the gradient of either in its kernel,

each linear in both arguments and each the others' derivative: as they say so here, derivatives of any order are made of them.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import pad

from frugan.memory.private import amx, applied

NARROW, MANY = 3, 256  # channels of large maps: at most those of images, and at least so many
SMALL, TINY = 8, 4  # pixels a side of small maps, at most
HALF = torch.float16, torch.bfloat16  # which are added up in single precision
UNMEASURED = "meta", "mps", "xla", "xpu"  # devices where nobody has asked

Operation = Literal["down", "up", "pair"]
EVERY = frozenset[Operation](("down", "up", "pair"))


@dataclass(frozen=True)
class Geometry:
    """How large maps and small ones lie to each other, and which operations are products."""

    kernel: int
    stride: int
    padding: int
    large: tuple[int, int]
    small: tuple[int, int]
    products: frozenset[Operation]

    @property
    def lacking(self) -> list[int]:
        """What a transposed convolution has to add at the end of each side, torch's ``output_padding``."""
        return [
            large - (small - 1) * self.stride + 2 * self.padding - self.kernel
            for large, small in zip(self.large, self.small, strict=True)
        ]


class ByProducts:
    """Base of the layers that can be products of matrices, equal but for rounding.

    Attributes:
        by_products: whether they look for that at all (`frugan.gan.build.lay_out`).
    """

    by_products = False


class Conv2d(ByProducts, nn.Conv2d):
    """torch's, by products where those are faster."""

    def forward(self, x: Tensor) -> Tensor:
        """``[n, in_channels, h, w]`` to ``[n, out_channels, ...]``."""
        if (planned := _planned_for(self, x)) is None:
            return super().forward(x)
        turned, geometry = planned
        x, kernel, bias = _cast(x, self.weight, self.bias)
        if turned:
            return up(x, kernel.flip(2, 3).transpose(0, 1), bias, geometry)
        return down(x, kernel, bias, geometry)


class ConvTranspose2d(ByProducts, nn.ConvTranspose2d):
    """torch's, as `Conv2d` is."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``[n, in_channels, h, w]`` to ``[n, out_channels, ...]``."""
        if output_size is not None or (planned := _planned_for(self, x)) is None:
            return super().forward(x, output_size)
        return up(*_cast(x, self.weight, self.bias), planned[1])


def _planned_for(layer: Conv2d | ConvTranspose2d, x: Tensor) -> tuple[bool, Geometry] | None:
    """How ``layer`` computes these maps by products; None: as torch does."""
    kind = x.device.type
    if not layer.by_products or kind in UNMEASURED or isinstance(layer.padding, str):
        return None
    special = layer.groups, layer.dilation, layer.padding_mode
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _planned(
        layer.transposed, layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        layer.output_padding, special == (1, (1, 1), "zeros"), tuple(x.shape[2:]), dtype, kind == "cpu",
    )  # fmt: skip


@cache
def _planned(
    transposed: bool, before: int, out: int, kernel: tuple[int, ...], strides: tuple[int, ...], paddings: tuple[int, ...],
    more: tuple[int, ...], plain: bool, size: tuple[int, ...], dtype: torch.dtype, cpu: bool,
) -> tuple[bool, Geometry] | None:  # fmt: skip
    """Whether a convolution is turned into a transposed one, and the geometry; None where nothing is faster."""
    if not plain or any(len({*pair}) > 1 for pair in (kernel, strides, paddings)):
        return None
    k, stride, padding = kernel[0], strides[0], paddings[0]
    here = (size[0], size[1])
    if transposed:
        large = [(s - 1) * stride - 2 * padding + k + m for s, m in zip(size, more, strict=True)]
        products = chosen(out, here, k, stride, dtype, cpu=cpu)
        return (False, Geometry(k, stride, padding, (large[0], large[1]), here, products)) if products else None
    turned = stride == 1 and k == 2 * padding + 1 and out < before  # it is a transposed one too
    if turned and (products := chosen(out, here, k, 1, dtype, cpu=cpu)):
        return True, Geometry(k, 1, padding, here, here, products)
    small = ((size[0] + 2 * padding - k) // stride + 1, (size[1] + 2 * padding - k) // stride + 1)
    products = chosen(before, small, k, stride, dtype, cpu=cpu)
    return (False, Geometry(k, stride, padding, here, small, products)) if products else None


def chosen(
    channels: int, small: tuple[int, int], kernel: int, stride: int, dtype: torch.dtype, *, cpu: bool = True
) -> frozenset[Operation]:
    """The operations that are products, between large maps of ``channels`` and ``small`` ones.

    Where they were faster on one processor with AMX, an Intel Xeon, and on one without, an AMD Zen 5 (`benchmarks/operators.py`,
    docs/LOG.md), and on an H100 (docs/gpu.md). Kernels of one pixel and one channel are for their maps, which have channels last:
    torch's have channels first there, and layers after would mix both.
    """
    if not cpu:
        return EVERY if channels == 1 and kernel > 1 else frozenset()
    if kernel == 1:
        return EVERY if channels == 1 else frozenset()
    bf16, strided, side = dtype == torch.bfloat16, stride > 1, max(small)
    many = channels >= MANY and strided and side <= TINY
    narrow = channels <= NARROW and (strided or channels == 1)
    if amx():
        found = {
            "down": many or channels == 1,
            "up": many or (strided and channels == 1 if bf16 else narrow and side > TINY),
            "pair": many or (bf16 and (strided if channels == 1 else channels > NARROW and side <= SMALL + 2 * strided)),
        }
    else:
        found = {
            "down": bf16 and (many or channels == 1),
            "up": narrow,
            "pair": bf16 and (strided if channels == 1 else channels > NARROW and side <= SMALL),
        }
    return frozenset(operation for operation in EVERY if found[operation])


def _cast(x: Tensor, kernel: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast has them."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, kernel, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), kernel.to(dtype), None if bias is None else bias.to(dtype)


def down(large: Tensor, kernel: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution ``[n, a, *large]``, ``[b, a, k, k]`` to ``[n, b, *small]``; ``bias``: ``[b]``."""
    made: Tensor = applied(_Down, large, kernel, bias, geometry)
    return made


def up(small: Tensor, kernel: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The transposed convolution ``[n, b, *small]``, ``[b, a, k, k]`` to ``[n, a, *large]``; ``bias``: ``[a]``."""
    made: Tensor = applied(_Up, small, kernel, bias, geometry)
    return made


def pair(large: Tensor, small: Tensor, geometry: Geometry) -> Tensor:
    """The gradient in the kernel, ``[b, a, k, k]``, of a convolution of ``large`` whose result has the gradient ``small``."""
    made: Tensor = applied(_Pair, large, small, None, geometry)
    return made


class _Operation(Function):
    """What the three have in common: two tensors that they are linear in, of which backward keeps what it needs, and a bias."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Geometry], output: Tensor) -> None:
        first, second, _, ctx.geometry = inputs
        ctx.shape = output.shape
        ctx.save_for_backward(first if ctx.needs_input_grad[1] else None, second if ctx.needs_input_grad[0] else None)
        ctx.save_for_forward(first, second)

    @classmethod
    def tangent(cls, ctx: Any, of_first: Tensor | None, of_second: Tensor | None, of_bias: Tensor | None) -> Tensor:
        """The product rule."""
        first, second = ctx.saved_tensors
        parts: list[Tensor] = []
        if of_first is not None:
            parts.append(applied(cls, of_first, second, None, ctx.geometry))
        if of_second is not None:
            parts.append(applied(cls, first, of_second, None, ctx.geometry))
        if of_bias is not None:
            parts.append(of_bias[:, None, None].expand(parts[0].shape if parts else ctx.shape))
        return sum(parts[1:], parts[0])


class _Down(_Operation):
    @staticmethod
    def forward(large: Tensor, kernel: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        if "down" not in geometry.products:
            return _convolution(large, kernel, bias, geometry)
        small = _maps(large, len(kernel), geometry.small)
        columns, matrix = _columns(large, geometry), _matrix(kernel)
        rows = small.permute(0, 2, 3, 1).view(-1, len(kernel))
        _ = torch.mm(columns, matrix, out=rows) if bias is None else torch.addmm(bias, columns, matrix, out=rows)
        return small

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        large, kernel = ctx.saved_tensors
        of_large = None if kernel is None else _derivative(_Up, gradient, kernel, None, ctx.geometry)
        of_kernel = None if large is None else _derivative(_Pair, large, gradient, None, ctx.geometry)
        return of_large, of_kernel, gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _Down.tangent(ctx, *tangents[:3])


class _Up(_Operation):
    @staticmethod
    def forward(small: Tensor, kernel: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        if "up" not in geometry.products:
            return _convolution(small, kernel, bias, geometry, transposed=True)
        large = _maps(small, kernel.shape[1], geometry.large).copy_(_laid(small, kernel, geometry))
        return large if bias is None else large.add_(bias[:, None, None])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        small, kernel = ctx.saved_tensors
        of_small = None if kernel is None else _derivative(_Down, gradient, kernel, None, ctx.geometry)
        of_kernel = None if small is None else _derivative(_Pair, gradient, small, None, ctx.geometry)
        return of_small, of_kernel, gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _Up.tangent(ctx, *tangents[:3])


class _Pair(_Operation):
    @staticmethod
    def forward(large: Tensor, small: Tensor, _: None, geometry: Geometry) -> Tensor:
        a, b, side = large.shape[1], small.shape[1], geometry.kernel
        kernel = torch.empty(b, a, side, side, dtype=small.dtype, device=small.device, memory_format=torch.channels_last)
        if "pair" in geometry.products:
            torch.mm(_rows(small).t(), _columns(large, geometry), out=kernel.permute(0, 2, 3, 1).view(b, -1))
            return kernel
        numbers = *_numbers(geometry), False, [0, 0], 1, [False, True, False]
        found: Tensor = torch.ops.aten.convolution_backward(small, large, kernel, None, *numbers)[1]
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        large, small = ctx.saved_tensors
        of_large = None if small is None else _derivative(_Up, small, gradient, None, ctx.geometry)
        of_small = None if large is None else _derivative(_Down, large, gradient, None, ctx.geometry)
        return of_large, of_small, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _Pair.tangent(ctx, *tangents[:3])


def _derivative(operation: type[_Operation], *given: Any) -> Tensor:
    """The operation in backward: as a function where there is a derivative of it too."""
    made: Tensor = applied(operation, *given) if torch.is_grad_enabled() else operation.forward(*given)
    return made


def _numbers(geometry: Geometry) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation as torch's operators want them."""
    return [geometry.stride] * 2, [geometry.padding] * 2, [1, 1]


def _convolution(x: Tensor, kernel: Tensor, bias: Tensor | None, geometry: Geometry, *, transposed: bool = False) -> Tensor:
    """torch's."""
    lacking = geometry.lacking if transposed else [0, 0]
    made: Tensor = torch.ops.aten.convolution(x, kernel, bias, *_numbers(geometry), transposed, lacking, 1)
    return made


def _rows(maps: Tensor) -> Tensor:
    """``[n, c, h, w]`` to a row for each pixel, ``[n * h * w, c]``; without a copy where channels are last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _maps(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """New maps with channels last: what is computed into them is no view, which layers after may overwrite."""
    return torch.empty(len(like), channels, *size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _matrix(kernel: Tensor) -> Tensor:
    """A kernel as what a row of columns is multiplied by: ``[k * k * a, b]``."""
    return kernel.permute(2, 3, 1, 0).reshape(-1, len(kernel))


def _columns(large: Tensor, geometry: Geometry) -> Tensor:
    """What the kernel sees at each pixel of the small maps: ``[n * h * w, k * k * a]``."""
    k, stride, n, a = geometry.kernel, geometry.stride, len(large), large.shape[1]
    wide = pad(large.permute(0, 2, 3, 1), (0, 0, *[geometry.padding] * 4))
    image, row, pixel, channel = wide.stride()
    where, each = (image, stride * row, stride * pixel), (row, pixel, channel)
    if a == 1:  # a kernel's pixel at a time, as copies of single numbers take long
        return wide.as_strided((k, k, a, n, *geometry.small), (*each, *where)).reshape(k * k * a, -1).t()
    return wide.as_strided((n, *geometry.small, k, k, a), (*where, *each)).reshape(-1, k * k * a)


def _laid(small: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
    """The transposed convolution ``[n, a, *large]`` by a product, whose columns are added up where they belong.

    A kernel is cut into tiles of stride x stride pixels, of which those at the same place never overlap.
    """
    k, stride, padding, (height, width) = geometry.kernel, geometry.stride, geometry.padding, geometry.large
    (h, w), n, a = geometry.small, len(small), kernel.shape[1]
    tiles = max(-(-k // stride), *(-(-(padding + size) // stride) - s + 1 for size, s in zip(geometry.large, (h, w), strict=True)))
    more = tiles * stride - k
    matrix, rows = _matrix(pad(kernel, (0, more, 0, more))), _rows(small)
    exact = torch.float32 if small.dtype in HALF else small.dtype
    places = (tiles, stride, tiles, stride, a)
    if a <= NARROW:  # as in `_columns`
        columns = (matrix @ rows.t()).view(*places, n, h, w).permute(0, 2, 5, 6, 1, 7, 3, 4)
        sums = columns.new_zeros(stride, stride, a, n, h + tiles - 1, w + tiles - 1, dtype=exact).permute(3, 4, 0, 5, 1, 2)
    else:
        columns = (rows @ matrix.t()).view(n, h, w, *places).permute(3, 5, 0, 1, 4, 2, 6, 7)
        sums = columns.new_zeros(n, h + tiles - 1, stride, w + tiles - 1, stride, a, dtype=exact)
    for i in range(tiles):
        for j in range(tiles):
            sums[:, i : i + h, :, j : j + w] += columns[i, j]
    whole = sums.reshape(n, (h + tiles - 1) * stride, (w + tiles - 1) * stride, a).permute(0, 3, 1, 2)
    return whole[:, :, padding : padding + height, padding : padding + width]
