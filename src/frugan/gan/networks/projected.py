"""A discriminator on frozen features of a network that has learnt the same images (Sauer et al. 2021, arXiv 2111.01007).

The paper's features are of a network trained on ImageNet; here they are learnt in seconds on the images at hand, before the first
update (`frugan.gan.features`). The encoder is a part of D whose parameters never learn with it: optimizers leave it out, and
checkpoints have it. Small heads look at its deepest levels, one more looks at the pixels, and each has a loss of its own (the
paper's equation 4), of which the mean is taken.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from frugan.config.architectures import Norm, Projected
from frugan.gan.networks.blocks import Block, Head, Mean, Network, norm, radford_init
from frugan.gan.networks.convolutions import Conv2d
from frugan.gan.networks.generators import GENERATORS
from frugan.memory.batchnorm import Beside
from frugan.utils.draws import Rows

WIDTHS = (2, 3, 6, 8)  # halves of the first level's channels, at each level; deeper ones have as many as the last of these
SMALLEST = 4  # pixels a side below which heads halve a map no further, once they have halved it


class Level(Block):
    """A level of features: a rectified 3x3 convolution, ``[n, before, s, s]`` to ``[n, out, t, t]``, t = s / stride rounded up."""

    def __init__(self, before: int, out: int, stride: int) -> None:
        super().__init__(Conv2d(before, out, 3, stride=stride, padding=1), nn.ReLU(inplace=True))
        self.out_channels = out
        self.begin()

    @property
    def weight(self) -> Tensor:
        """Of the convolution."""
        return self.get_parameter("0.weight")

    @property
    def bias(self) -> Tensor:
        """Of the convolution."""
        return self.get_parameter("0.bias")

    def begin(self) -> None:
        """Draws weights with which rectified maps keep their scale (He et al. 2015), and no bias."""
        nn.init.kaiming_normal_(self.weight)
        nn.init.zeros_(self.bias)


class ProjectedDiscriminator(Network):
    """Heads on levels of a frozen encoder.

    Its blocks are the heads, from the one on pixels to the one on the deepest level, then the levels of the encoder (`places`).

    Args:
        encoder: its levels, from the largest map on.
        heads: the one on pixels, and those on the deepest levels in their order: features ``[n, c, h, w]`` to logits ``[n]``.
    """

    def __init__(self, encoder: Sequence[Level], heads: Sequence[Block]) -> None:
        super().__init__(*heads, *encoder)
        self.heads = len(heads)

    @property
    def encoder(self) -> list[Level]:
        """The levels of features, which are frozen."""
        return [block for block in self.blocks if isinstance(block, Level)]

    @property
    def chain(self) -> list[nn.Module]:
        """It is no chain of its blocks."""
        return [self]

    def forward(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        """Images ``[n, c, h, w]`` to a logit of each head, ``[n, heads]``."""
        heads, encoder = [*self.blocks][: self.heads], self.encoder
        with Beside() as beside:  # for which batch norm over the whole batch passes as often as the longest head has layers of it
            logits = [beside(heads[0], x, rows)]
            for deeper, level in zip(range(len(encoder) - 1, -1, -1), encoder, strict=True):
                x = level(x)
                if deeper < len(heads) - 1:
                    logits.append(beside(heads[-1 - deeper], x, rows))
        return torch.stack(logits, 1)


def head(before: int, side: int, widths: Sequence[int], kind: Norm, block: type[Block] = Block) -> Block:
    """Strided convolutions of ``widths`` channels, and the mean of a 3x3 one: ``[n, before, side, side]`` to ``[n]``."""
    layers: list[nn.Module] = []
    for out in widths:
        halves = side >= SMALLEST
        down = Conv2d(before, out, 4 if halves else 3, stride=2 if halves else 1, padding=1, bias=kind == "none")
        layers += [down, *norm(kind, out), nn.LeakyReLU(0.2, inplace=True)]
        before, side = out, side // 2 if halves else side
    made = block(*layers, Mean(before, 1, 3, padding=1), nn.Flatten(0))
    radford_init(made)
    return made


def places(options: Projected, image_size: int) -> dict[tuple[str, int], int]:
    """The numbers of D's blocks: of each ``level`` from the images on, of the ``head`` on it, and of that on the pixels (-1)."""
    there = len(options.feature_sizes(image_size))
    heads = [-1, *range(there - options.levels(image_size), there)]
    numbers = {("head", level): number for number, level in enumerate(heads)}
    return numbers | {("level", level): len(heads) + level for level in range(there)}


def build(options: Projected, image_size: int, channels: int) -> tuple[Network, Network]:
    """Both networks; see `frugan.gan.networks.build`."""
    generator = GENERATORS[options.upsampling](
        options.latent_dim, options.sizes(image_size), options.width_g, channels, options.norm_g, modulation=options.modulation
    )
    radford_init(generator)

    encoder: list[Level] = []
    before = channels
    sizes = options.feature_sizes(image_size)
    for i in range(len(sizes)):
        out = options.feature_width * WIDTHS[min(i, len(WIDTHS) - 1)] // 2
        encoder.append(Level(before, out, stride=2 if i else 1))
        before = out
    width, kind = options.width_d, options.norm_d
    heads = [head(channels, image_size, [width // 2, width], kind)]
    for level, side in list(zip(encoder, sizes, strict=True))[-options.levels(image_size) :]:
        halvings = 1
        while side >> halvings > SMALLEST:
            halvings += 1
        deepest = level is encoder[-1]  # where classes are learnt
        heads.append(head(level.out_channels, side, [width] * halvings, kind, Head if deepest else Block))
    discriminator = ProjectedDiscriminator(encoder, heads)
    for level in encoder:
        level.requires_grad_(False)
    return generator, discriminator
