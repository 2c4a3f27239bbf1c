"""What the networks are made of."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from frugan.config.architectures import Norm
from frugan.gan.networks.convolutions import ByProducts
from frugan.memory.private import batch_norm
from frugan.utils.draws import Draws, Rows

SHIFT = 0.3  # of noise by its class, at first, in standard deviations of noise


class OfSamples(nn.Module):
    """Base of the layers that are called with ``(x, rows)``: they need to know which samples ``x``, ``[n, ...]``, is of."""


class Dropout(OfSamples):
    """Dropout whose mask belongs to the samples, so that cutting a batch into micro-batches changes nothing."""

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p = p
        self.name = name

    def forward(self, x: Tensor, rows: Rows | None) -> Tensor:
        """``x``: ``[n, ...]``; ``rows`` must be given while training."""
        if not self.training or self.p == 0:
            return x
        assert rows is not None, "dropout needs to know which samples it is for"
        keep = rows.keep(self.name, tuple(x.shape[1:]), self.p)
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))


class Modulated(OfSamples, nn.Linear):
    """Maps ``h``, scaled and shifted by the noise ``z`` that a sample is made from, ``(1 + A z) h + B z + c`` for each channel, and
    activated (self-modulation, Chen et al. 2019, arXiv 1810.01365, without its hidden layer).

    Args:
        latent_dim: of the noise.
        channels: of the maps.
        activation: what follows.
    """

    def __init__(self, latent_dim: int, channels: int, activation: nn.Module | None = None) -> None:
        super().__init__(latent_dim, 2 * channels)
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor, rows: Rows | None) -> Tensor:  # type: ignore[override]
        """Maps ``[n, channels, h, w]`` to the same; ``rows`` must have the noise."""
        assert rows is not None and rows.noise is not None, "a modulated layer needs the noise of its samples"
        made = nn.functional.linear(rows.noise, self.weight, self.bias).to(x.dtype)
        scale, shift = made[:, :, None, None].chunk(2, 1)
        found: Tensor = self.activation(torch.addcmul(shift, x, scale + 1))
        return found


class Block(nn.Sequential):
    """Layers that belong together: the unit of activation checkpointing and of freezing."""

    def forward(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        """Applies the layers in turn; those that need to know for which samples are told."""
        return through(self, x, rows)


def through(layers: Iterable[nn.Module], x: Tensor, rows: Rows | None) -> Tensor:
    """``x`` after each of ``layers`` in turn; those that need to know for which samples are told."""
    for layer in layers:
        x = layer(x, rows) if isinstance(layer, OfSamples) else layer(x)
    return x


class Mean(ByProducts, nn.Conv2d):
    """The mean of a convolution's maps: ``[n, c, h, w]`` to ``[n, out_channels]``, in at least single precision.

    It is linear in all of a map: by products it is one, with the kernel as it is spread over the map.

    Args:
        before: c.
        out: maps.
        kernel: its side.
        padding: of maps.
        grid: whether maps are brought to the kernel's size by means first, so that it sees all of them at once.
    """

    def __init__(self, before: int, out: int, kernel: int, padding: int = 0, *, grid: bool = False) -> None:
        super().__init__(before, out, kernel, padding=padding)
        self.average = Average(kernel) if grid else None
        self.constants = Constants()

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        return self.product(x, self.weight, self.bias)

    def product(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same with another ``kernel`` ``[m, c, k, k]``: ``[n, m]``."""
        if not self.by_products:
            maps = nn.functional.conv2d(self.average(x) if self.average else x, kernel, bias, padding=self.padding)
            return maps.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        with nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False):
            met = self._averaged if self.average else self._met
            down, across = (met(size, kernel) for size in x.shape[2:])
            spread = down.T @ kernel @ across
            rows = x.to(kernel.dtype).permute(0, 2, 3, 1).flatten(1)  # without a copy where channels are last
            made = rows @ spread.permute(0, 2, 3, 1).flatten(1).T
            return made if bias is None else made + bias

    def _averaged(self, size: int, like: Tensor) -> Tensor:
        """``[k, size]``: how much of a pixel is in a mean."""
        return self.constants(means, size, self.kernel_size[0], like=like)

    def _met(self, size: int, like: Tensor) -> Tensor:
        """``[k, size]``: how often, of all times, a number of the kernel meets a pixel."""
        return self.constants(_meeting, size, self.kernel_size[0], int(self.padding[0]), like=like)


class Head(Block):
    """The last block of a discriminator: layers that give features, one that makes one logit of these (dense, or a `Mean`), and one
    that makes that ``[n]``.

    Once it is told how many classes there are, each has weights of its own in the layer that makes logits, which are added to those
    that all share: the projection of Miyato and Koyama (2018, arXiv 1802.05637, equation 5), here of features that still know where
    they are. They begin at zero.
    """

    classes: nn.Parameter | None

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_parameter("classes", None)

    def condition(self, classes: int) -> None:
        """Makes the weights of classes, each of the shape of those that all share: ``[classes, ...]``."""
        weight = list(self)[-2].get_parameter("weight")
        self.classes = nn.Parameter(weight.new_zeros(classes, *weight.shape[1:]))

    def forward(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        """Logits ``[n]``; ``rows`` must have classes if they are learnt."""
        *before, last, flat = self
        x = through(before, x, rows)
        logits: Tensor = last(x)
        if self.classes is not None:
            logits = logits + self.of_classes(x, rows)
        result: Tensor = flat(logits)
        return result

    def of_classes(self, x: Tensor, rows: Rows | None) -> Tensor:
        """What features ``x`` add to the logits by the weights of each sample's class: ``[n, 1]``."""
        assert self.classes is not None
        assert rows is not None and rows.classes is not None, "a conditional discriminator needs the classes of its samples"
        last = self[-2]
        of_each = last.product(x, self.classes) if isinstance(last, Mean) else nn.functional.linear(x, self.classes)
        return of_each.gather(1, rows.classes[:, None])


class ClassNoise(OfSamples):
    """Noise that says the class too: it is shifted by a learnt vector, at first a small one, so that an unconditional generator
    would make its images of it as well.

    Where the shift is as large as the noise, the generator learns to look at nothing else, and samples of a class are all alike.

    Args:
        classes: how many there are.
        latent_dim: of the noise.
    """

    def __init__(self, classes: int, latent_dim: int) -> None:
        super().__init__()
        self.classes = nn.Parameter(torch.empty(classes, latent_dim).normal_().mul_(SHIFT))

    def forward(self, x: Tensor, rows: Rows | None) -> Tensor:
        """Noise ``[n, latent_dim]`` to the same; ``rows`` must have classes."""
        assert rows is not None and rows.classes is not None, "a conditional generator needs the classes of its samples"
        return x + nn.functional.embedding(rows.classes, self.classes)


class Network(nn.Module):
    """A chain of blocks, if a subclass does not make more of them: base of both networks.

    A generator maps noise ``[n, latent_dim]`` to images ``[n, channels, size, size]`` in [-1, 1]; a discriminator, whose last
    block is a `Head`, maps images to one logit each, ``[n]``, or to one of each of several heads, ``[n, heads]``.

    Attributes:
        entry: what noise goes through first, if there are classes.
        modulated: whether blocks are told the noise too.
    """

    entry: ClassNoise | None

    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.register_module("entry", None)
        self.blocks = nn.ModuleList(blocks)
        self.modulated = any(isinstance(m, Modulated) for m in self.modules())

    def forward(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        """Applies the blocks in turn."""
        if self.entry is not None:
            x = self.entry(x, rows)
        if self.modulated:
            rows = replace(rows or Rows(Draws(0), "unnamed", 0, len(x)), noise=x)
        for block in self.blocks:
            x = block(x, rows)
        return x

    @property
    def chain(self) -> list[nn.Module]:
        """Modules that make the network, one after the other, each called with samples and the rows that belong to them."""
        return [*self.blocks]

    def frozen(self) -> set[str]:
        """The names of parameters that do not learn."""
        return {name for name, parameter in self.named_parameters() if not parameter.requires_grad}

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's output depends on the others in its (micro-)batch."""
        return any(isinstance(m, batch_norm()) for m in self.modules())


def norm(kind: Norm, channels: int, *, flat: bool = False) -> list[nn.Module]:
    """The normalisation called ``kind`` for ``[n, channels, h, w]``, or ``[n, channels]`` if ``flat``."""
    if kind == "batch":
        return [nn.BatchNorm1d(channels) if flat else nn.BatchNorm2d(channels)]
    if kind == "group" and not (flat and channels == 1):  # a number alone would become 0
        groups = next(g for g in range(min(16, max(1, channels // 2) if flat else channels), 0, -1) if channels % g == 0)
        return [nn.GroupNorm(groups, channels)]
    return []


class Map(nn.Module):
    """Numbers ``[n, channels * size**2]`` to a first map ``[n, channels, size, size]``.

    Attributes:
        memory_format: that of the other maps (`frugan.gan.build.lay_out`): layers would copy one that lies otherwise each time.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.shape = (channels, size, size)
        self.memory_format = torch.contiguous_format

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        return x.reshape(len(x), *self.shape).contiguous(memory_format=self.memory_format)


class Average(nn.Module):
    """Adaptive average pooling to ``size``: each pixel is the mean of those it covers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.constants = Constants()

    def forward(self, x: Tensor) -> Tensor:
        """``[n, c, h, w]`` to ``[n, c, size, size]``."""
        times = [n // self.size if n % self.size == 0 else 0 for n in x.shape[2:]]
        if all(times) and x.device.type == "cpu":
            return nn.functional.avg_pool2d(x, times)  # the same, faster
        if all(times) or x.device.type in ("cpu", "meta"):
            return nn.functional.adaptive_avg_pool2d(x, self.size)
        # Where windows differ in size MPS refuses, and CUDA's gradient has other last bits each time; the same as two products with
        # matrices of means.
        down, across = (self.constants(means, n, self.size, like=x) for n in x.shape[2:])
        return down @ x @ across.T


def means(length: int, size: int, like: Tensor) -> Tensor:
    """The matrix ``[size, length]`` that takes adaptive means along a dimension, in the dtype and on the device of ``like``."""
    number = torch.arange(size, device=like.device)
    begin, end = number * length // size, -(-(number + 1) * length // size)
    place = torch.arange(length, device=like.device)
    covered = (place >= begin[:, None]) & (place < end[:, None])
    return covered.to(like) / (end - begin)[:, None]


def _meeting(size: int, k: int, padding: int, like: Tensor) -> Tensor:
    times = size + 2 * padding - k + 1
    number, place = torch.arange(k, device=like.device)[:, None], torch.arange(size, device=like.device)
    first = place + padding - number
    return ((first >= 0) & (first < times)).to(like) / times


class Constants:
    """What a layer computes of sizes alone, kept on a GPU for as long as the layer is there.

    Of the thousand kernels of an update of `projected` two hundred made such matrices.
    """

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def __call__(self, make: Callable[..., Tensor], *numbers: int, like: Tensor) -> Tensor:
        """What ``make`` gives for ``numbers`` in the dtype and on the device of ``like``."""
        if like.device.type in ("cpu", "meta", "xla"):
            return make(*numbers, like)
        key = make, numbers, like.dtype, like.device
        if (kept := self._made.get(key)) is not None:
            return kept
        with torch.inference_mode(False), torch.no_grad():
            made = make(*numbers, like)
        if not (like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):  # else it would be the graph's own
            self._made[key] = made
        return made


def widths(base: int, sizes: list[int]) -> list[int]:
    """Channels at each of ``sizes`` (ascending): ``base`` at the largest but one, doubled downwards, at most 8 times as many."""
    return [base * min(8, 2 ** (len(sizes) - 2 - i)) for i in range(len(sizes) - 1)]


@torch.no_grad()
def radford_init(network: nn.Module) -> None:
    """Weights from N(0, 0.02), scales of batch norm from N(1, 0.02) (Radford et al. 2015, section 4).

    Without normalisation that is too small to learn from: then weights keep their scale from layer to layer (He et al. 2015).
    """
    normed = any(isinstance(m, (*batch_norm(), nn.GroupNorm)) for m in network.modules())
    for m in network.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            if normed or isinstance(m, Modulated):
                nn.init.normal_(m.weight, 0.0, 0.02)
            else:
                nn.init.kaiming_normal_(m.weight, a=0.2)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, batch_norm()):
            nn.init.normal_(m.get_parameter("weight"), 1.0, 0.02)
