"""The kinds of networks and their options. Add a network by adding its dataclass here and its builder to `frugan.gan.networks`."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from frugan.config.section import Kinded, option
from frugan.utils.errors import UserError

Norm = Literal["batch", "group", "none"]
DEEPEST = 5  # levels of features that a discriminator is built on
FEW, LARGE = 3, 32  # levels that have a head, unless images are larger than so many pixels


@dataclass(frozen=True, kw_only=True)
class Architecture(Kinded):
    """A generator and a discriminator; `frugan.gan.networks.build` makes the modules."""

    role: ClassVar[str] = "network"
    kinds: ClassVar[dict[str, type[Any]]] = {}
    learns_features: ClassVar[bool] = False  # before the first update
    latent_dim: int = option(100, "numbers of noise that one image is made from", least=1)
    depth: int | None = option(
        None, "how often the image size is halved on the way down; unset: until 4 to 7 pixels are left", least=1
    )

    def resolved(self, classes: int) -> Self:
        """The same with nothing left open, for images of so many classes (0: there are no labels)."""
        return self

    def sizes(self, image_size: int) -> list[int]:
        """Sides of the feature maps from the smallest to ``image_size``, each about half of the next (odd ones rounded up)."""
        sizes = [image_size]
        while len(sizes) <= self.depth if self.depth is not None else sizes[0] > 7:
            sizes.insert(0, -(-sizes[0] // 2))
        if sizes[0] < 2:
            raise UserError(f"--depth {self.depth} is too deep for {image_size} pixels: the smallest map would have {sizes[0]}.")
        return sizes


Upsampling = Literal["transposed", "nearest", "residual"]
UPSAMPLING = (
    "how the generator enlarges maps: transposed convolutions; nearest upsampling and one 3x3 convolution, or residual blocks"
)
MODULATION = "noise scales and shifts the generator's maps after each normalisation (self-modulation)"


@dataclass(frozen=True, kw_only=True)
class Mlp(Architecture):
    """Dense discriminator; generator from a dense layer and transposed convolutions."""

    kind: ClassVar[str] = "mlp"
    width_g: int = option(64, "channels of the generator's largest maps; doubled with every halving, up to 8 times", least=1)
    width_d: int = option(512, "units of the discriminator's first dense layer; halved in each further one", least=1)
    layers_d: int = option(2, "dense layers of the discriminator before its last", least=1, most=8)
    norm_g: Norm = option("batch", "normalisation in the generator")
    norm_d: Norm = option("none", "normalisation in the discriminator")
    dropout: float = option(0.3, "chance of each unit of the discriminator to be left out", least=0, most=0.9)


@dataclass(frozen=True, kw_only=True)
class Upsample(Architecture):
    """Nearest upsampling and convolution; strided convolution with dropout."""

    kind: ClassVar[str] = "upsample"
    latent_dim: int = option(256, "numbers of noise that one image is made from", least=1)
    width_g: int = option(32, "channels of the generator's largest maps; doubled with every halving, up to 8 times", least=1)
    width_d: int = option(64, "channels of the discriminator's largest maps; doubled with every halving, up to 8 times", least=1)
    norm_g: Norm = option("batch", "normalisation in the generator")
    norm_d: Norm = option("none", "normalisation in the discriminator")
    dropout: float = option(0.3, "chance of each value in the discriminator to be left out", least=0, most=0.9)


@dataclass(frozen=True, kw_only=True)
class Dcgan(Architecture):
    """Transposed convolutions, or others; strided convolutions (Radford et al. 2015, arXiv 1511.06434)."""

    kind: ClassVar[str] = "dcgan"
    upsampling: Upsampling = option("transposed", UPSAMPLING)
    modulation: bool = option(False, MODULATION)
    width_g: int = option(64, "channels of the generator's largest maps; doubled with every halving, up to 8 times", least=1)
    width_d: int = option(64, "channels of the discriminator's largest maps; doubled with every halving, up to 8 times", least=1)
    norm_g: Norm = option("batch", "normalisation in the generator")
    norm_d: Norm = option("batch", "normalisation in the discriminator, but for its first layer")


@dataclass(frozen=True, kw_only=True)
class R3(Architecture):
    """Norm-free residual networks (Huang et al. 2024, arXiv 2501.05441, section 4)."""

    kind: ClassVar[str] = "r3"
    latent_dim: int = option(64, "numbers of noise that one image is made from", least=1)
    width_g: int = option(16, "channels of the generator's largest maps; doubled with every halving, up to 8 times", least=1)
    width_d: int = option(16, "channels of the discriminator's largest maps; doubled with every halving, up to 8 times", least=1)
    blocks: int = option(1, "residual blocks at each image size (the paper has 2)", least=1)
    expansion: int = option(1, "how much wider the inside of a residual block is (the paper has 2)", least=1)
    groups: int = option(1, "groups of each 3x3 convolution (the paper has channels / 16)", least=1)


@dataclass(frozen=True, kw_only=True)
class Projected(Architecture):
    """Heads on frozen features of a network that learns the same images first (Sauer et al. 2021, arXiv 2111.01007)."""

    kind: ClassVar[str] = "projected"
    learns_features: ClassVar[bool] = True
    latent_dim: int = option(64, "numbers of noise that one image is made from", least=1)
    width_g: int = option(
        32,
        "channels of the generator's largest maps (residual: largest but one); doubled with every halving, up to 8 times",
        least=2,
    )
    width_d: int = option(64, "channels of the discriminator's heads", least=2)
    norm_g: Norm = option("batch", "normalisation in the generator")
    norm_d: Norm = option("batch", "normalisation in the discriminator's heads")
    upsampling: Upsampling = option("residual", UPSAMPLING)
    modulation: bool = option(False, MODULATION)  # the recipe has it; files of runs from before do not name it
    features: Literal["auto", "labels", "rotations", "both", "random"] = option(
        "auto", "what the frozen features are learnt from; auto: labels if there are any, else rotations; random: never trained"
    )
    feature_width: int = option(32, "channels of the features' largest maps; deeper ones have 1.5, 3 and 4 times as many", least=2)
    feature_levels: int | None = option(
        None, "levels of the features that have a head, from the deepest on; unset: 3, or all for images above 32 pixels", least=1
    )
    feature_updates: int | None = option(
        None,
        "updates in which the features are learnt, at most; unset: 400, up to 2,000 for long trainings of small images",
        least=1,
    )
    feature_rate: float = option(2e-3, "learning rate of the features, which falls evenly to 0", above=0)

    def resolved(self, classes: int) -> Self:
        """The same, for images of so many classes (0: there are no labels).

        Raises:
            UserError: features are to be learnt from labels, and there are none, or one class only.
        """
        if self.features in ("labels", "both") and classes < 2:
            there = "there is one class only" if classes else "there are none"
            raise UserError(f"--features {self.features} needs labels, and {there}: use --features rotations, or auto.")
        auto: Literal["labels", "rotations"] = "labels" if classes > 1 else "rotations"
        return dataclasses.replace(self, features=auto) if self.features == "auto" else self

    def levels(self, image_size: int) -> int:
        """How many levels of features have a head, for images of ``image_size``.

        Where there are only three heads on photographs of 64 pixels, nobody looks at colours, and they go wrong (docs/LOG.md).
        """
        there = len(self.feature_sizes(image_size))
        return min(there, self.feature_levels or (there if image_size > LARGE else FEW))

    def feature_sizes(self, image_size: int) -> list[int]:
        """Sides of the feature maps from ``image_size`` down, each half of the one before (odd ones rounded up)."""
        sizes = [image_size]
        while sizes[-1] > 4 and len(sizes) < DEEPEST:
            sizes.append(-(-sizes[-1] // 2))
        return sizes
