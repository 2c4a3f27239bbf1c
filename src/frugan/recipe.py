"""The vocabulary: what to train, as small frozen dataclasses that are validated when built.

Nothing here imports torch, so that the command line answers at once. A `Recipe` is made of sections; every field of every
section has a name of its own across all of them, so that a recipe can also be read and changed flat: the same names are the
flags of the command line, the keyword arguments of `frugan.train` and the keys of ``recipe.toml``.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import tomli_w

from frugan.errors import UserError, nearest
from frugan.section import Kinded, Section, option

SMALLEST_IMAGE = 8  # pixels a side: below it no recipe has a stage left to learn with


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """Which images, and how they are made to fit."""

    data: str = option(
        "digits", "folder, zip or tars of images, parquet, IDX files, a data set on the hub, or digits, mnist, fashion-mnist"
    )
    split: str = option("train", "which part of a data set that has parts: train, test, all, or what it calls it")
    image_column: str | None = option(None, "of a table of images; unset: the first with images in it")
    label_column: str | None = option(None, "of a table of images, or key of JSON labels; unset: what is found")
    image_size: int | None = option(
        None, "side of the square images, in pixels; unset: the data's own, or 64 for files", least=SMALLEST_IMAGE
    )
    channels: Literal[1, 3] | None = option(None, "1 for grey, 3 for colour; unset: decided from the data")
    stream: bool = option(False, "read tar or parquet shards as training goes, for data larger than the disk; URLs always are")
    background: str = option("white", "what transparent pixels are laid upon: a colour name or #rrggbb")
    flip: bool = option(False, "mirror half of the images left to right, drawn anew each time")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image, once size and channels are known."""
        assert self.channels and self.image_size
        return self.channels, self.image_size, self.image_size


Norm = Literal["batch", "group", "none"]
Choice = Literal["auto", "yes", "no"]  # auto: if the memory there is asks for it


@dataclass(frozen=True, kw_only=True)
class Network(Kinded):
    """A generator and a discriminator; `frugan.networks.build` makes the modules."""

    role: ClassVar[str] = "network"
    kinds: ClassVar[dict[str, type[Any]]] = {}
    latent_dim: int = option(100, "numbers of noise that one image is made from", least=1)
    depth: int | None = option(
        None, "how often the image size is halved on the way down; unset: until 4 to 7 pixels are left", least=1
    )

    def sizes(self, image_size: int) -> list[int]:
        """Sides of the feature maps from the smallest to ``image_size``, each about half of the next (odd ones rounded up)."""
        sizes = [image_size]
        while len(sizes) <= self.depth if self.depth is not None else sizes[0] > 7:
            sizes.insert(0, -(-sizes[0] // 2))
        if sizes[0] < 2:
            raise UserError(f"--depth {self.depth} is too deep for {image_size} pixels: the smallest map would have {sizes[0]}.")
        return sizes


@dataclass(frozen=True, kw_only=True)
class Mlp(Network):
    """Dense discriminator; generator from a dense layer and transposed convolutions."""

    kind: ClassVar[str] = "mlp"
    width_g: int = option(64, "channels of the generator's largest maps; doubled with every halving, up to 8 times", least=1)
    width_d: int = option(512, "units of the discriminator's first dense layer; halved in each further one", least=1)
    layers_d: int = option(2, "dense layers of the discriminator before its last", least=1, most=8)
    norm_g: Norm = option("batch", "normalisation in the generator")
    norm_d: Norm = option("none", "normalisation in the discriminator")
    dropout: float = option(0.3, "chance of each unit of the discriminator to be left out", least=0, most=0.9)


@dataclass(frozen=True, kw_only=True)
class Upsample(Network):
    """Nearest upsampling and convolution; strided convolution with dropout."""

    kind: ClassVar[str] = "upsample"
    latent_dim: int = option(256, "numbers of noise that one image is made from", least=1)
    width_g: int = option(32, "channels of the generator's largest maps; doubled with every halving, up to 8 times", least=1)
    width_d: int = option(64, "channels of the discriminator's largest maps; doubled with every halving, up to 8 times", least=1)
    norm_g: Norm = option("batch", "normalisation in the generator")
    norm_d: Norm = option("none", "normalisation in the discriminator")
    dropout: float = option(0.3, "chance of each value in the discriminator to be left out", least=0, most=0.9)


@dataclass(frozen=True, kw_only=True)
class Dcgan(Network):
    """Transposed convolutions; strided convolutions (Radford et al. 2015, arXiv 1511.06434)."""

    kind: ClassVar[str] = "dcgan"
    width_g: int = option(64, "channels of the generator's largest maps; doubled with every halving, up to 8 times", least=1)
    width_d: int = option(64, "channels of the discriminator's largest maps; doubled with every halving, up to 8 times", least=1)
    norm_g: Norm = option("batch", "normalisation in the generator")
    norm_d: Norm = option("batch", "normalisation in the discriminator, but for its first layer")


@dataclass(frozen=True, kw_only=True)
class R3(Network):
    """Norm-free residual networks (Huang et al. 2024, arXiv 2501.05441, section 4)."""

    kind: ClassVar[str] = "r3"
    latent_dim: int = option(64, "numbers of noise that one image is made from", least=1)
    width_g: int = option(16, "channels of the generator's largest maps; doubled with every halving, up to 8 times", least=1)
    width_d: int = option(16, "channels of the discriminator's largest maps; doubled with every halving, up to 8 times", least=1)
    blocks: int = option(1, "residual blocks at each image size (the paper has 2)", least=1)
    expansion: int = option(1, "how much wider the inside of a residual block is (the paper has 2)", least=1)
    groups: int = option(1, "groups of each 3x3 convolution (the paper has channels / 16)", least=1)


@dataclass(frozen=True, kw_only=True)
class Objective(Kinded):
    """What both networks minimise; `frugan.objective` holds the arithmetic."""

    role: ClassVar[str] = "objective"
    kinds: ClassVar[dict[str, type[Any]]] = {}
    r1: float = option(0.0, "weight of half the squared gradient of D at real images", least=0)
    r2: float = option(0.0, "weight of half the squared gradient of D at generated images", least=0)


@dataclass(frozen=True, kw_only=True)
class Bce(Objective):
    """Binary cross entropy, non-saturating (Goodfellow et al. 2014, arXiv 1406.2661)."""

    kind: ClassVar[str] = "bce"
    label_smoothing: float = option(0.0, "how far the target of real images lies below 1 (one-sided)", least=0, most=0.5)


@dataclass(frozen=True, kw_only=True)
class Hinge(Objective):
    """Hinge loss (Lim and Ye 2017, arXiv 1705.02894)."""

    kind: ClassVar[str] = "hinge"


@dataclass(frozen=True, kw_only=True)
class WganGp(Objective):
    """Wasserstein loss with gradient penalty (Gulrajani et al. 2017, arXiv 1704.00028)."""

    kind: ClassVar[str] = "wgan-gp"
    gradient_penalty: float = option(10.0, "weight of the penalty on gradients between real and generated images", least=0)


@dataclass(frozen=True, kw_only=True)
class RpGan(Objective):
    """Relativistic pairing loss (Jolicoeur-Martineau 2018, arXiv 1807.00734; Huang et al. 2024, equation 2)."""

    kind: ClassVar[str] = "rpgan"


@dataclass(frozen=True, kw_only=True)
class Optimizer(Section):
    """Adam (Kingma and Ba 2014) for both networks, and how its learning rates change."""

    lr_g: float = option(2e-4, "learning rate of the generator", above=0)
    lr_d: float = option(2e-4, "learning rate of the discriminator", above=0)
    beta1: float = option(0.5, "decay of Adam's first moment", least=0, most=0.9999)
    beta2: float = option(0.999, "decay of Adam's second moment", least=0, most=0.999999)
    schedule: Literal["constant", "step", "cosine", "exponential", "plateau"] = option("constant", "how both learning rates change")
    schedule_epochs: int = option(
        10, "epochs in which the rates fall by the factor: at once (step) or evenly (exponential)", least=1
    )
    schedule_factor: float = option(0.5, "what step, exponential and plateau multiply the rates by", above=0, most=1)
    schedule_patience: int = option(5, "plateau: epochs without a lower loss that are waited for", least=0)


@dataclass(frozen=True, kw_only=True)
class Training(Section):
    """How long, in what batches, from where."""

    epochs: int = option(20, "how often every image is seen", least=1)
    batch_size: int = option(128, "images in one update, however it is cut into micro-batches", least=1)
    discriminator_steps: int = option(1, "updates of the discriminator for each of the generator", least=1)
    ema_half_life: float = option(
        10_000, "images after which the averaged generator has forgotten half; 0: do not average", least=0
    )
    seed: int = option(0, "the same seed gives the same training", least=0)
    init_from: str | None = option(None, "run folder whose weights to start from (fine-tuning)")
    freeze_d: int = option(0, "first blocks of the discriminator that stay as they are when fine-tuning", least=0)


@dataclass(frozen=True, kw_only=True)
class Memory(Section):
    """How the arithmetic is laid out: only ``precision`` changes more than rounding, unless a network couples samples."""

    accumulation_steps: int | None = option(
        None, "micro-batches that the discriminator's batch is cut into; unset: as few as fit", least=1
    )
    generator_accumulation_steps: int | None = option(
        None, "micro-batches that the generator's batch is cut into; unset: as the discriminator's, or as few as fit", least=1
    )
    separate_terms: Choice = option("auto", "one backward for real images, then one for generated ones (reassociation)")
    penalty: Literal["auto", "double-backward", "jvp"] = option(
        "auto", "how gradient penalties are differentiated; jvp: forwards, which takes less together with the next (reassociation)"
    )
    checkpoint_blocks: Choice = option("auto", "keep the inputs of each block alone and compute it again in backward (bitwise)")
    recompute_generator: Choice = option("auto", "run G again for its backward, so that it is not held beside D (bitwise)")
    offload_activations: Choice = option("auto", "what backward needs waits on the host (bitwise; accelerators)")
    offload_state: Choice = option(
        "auto", "moments and the averaged generator wait on the host (bitwise; accelerators); auto: where nothing fits otherwise"
    )
    in_place: bool = option(True, "activations overwrite what they are applied to (bitwise)")
    lean_adam: bool = option(True, "Adam keeps no first moment where beta1 is 0 (reassociation)")
    moments: Literal["fp32", "8bit"] = option("fp32", "how Adam keeps its moments; 8bit needs torchao (approximate)")
    precision: Literal["fp32", "tf32", "bf16", "fp16", "auto"] = option(
        "fp32", "arithmetic inside the networks; auto: bf16 or fp16 where the device is fast at it (all but fp32 approximate)"
    )
    channels_last: bool = option(True, "lay images out with the channels innermost: faster convolutions")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what is trained. Built by the functions of `frugan.recipes`, changed by `replace`."""

    recipe: str
    data: Data = Data()
    network: Network
    objective: Objective
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    memory: Memory = Memory()

    def sections(self) -> dict[str, Section]:
        """The sections by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recipe"}

    def flat(self) -> dict[str, Any]:
        """Every setting by its own name, and the kinds of network and objective under theirs."""
        values: dict[str, Any] = {}
        for name, section in self.sections().items():
            if isinstance(section, Kinded):
                values[name] = section.kind
            values |= {f.name: getattr(section, f.name) for f in fields(section)}
        return values

    def replace(self, **values: Any) -> Self:
        """A recipe with these settings changed, by their flat names.

        ``network`` or ``objective`` change the kind; settings that both kinds have keep their values.

        Raises:
            UserError: a name that no section has (with the nearest), or a value outside its range.
        """
        changed: dict[str, Section] = {}
        for name in ("network", "objective"):
            section = self.sections()[name]
            if name in values and isinstance(section, Kinded) and values[name] != section.kind:
                kind = type(section).of(values[name])
                kept = {f.name for f in fields(kind)} & {f.name for f in fields(section)}
                changed[name] = kind(**{k: getattr(section, k) for k in kept})
        result = dataclasses.replace(self, **changed)  # type: ignore[arg-type]
        owners = result.flat().keys()
        for name in values:
            if name not in owners:
                raise UserError(f"there is no setting {name!r} in recipe {self.recipe!r}: {nearest(name, owners)}")
        for name, section in result.sections().items():
            own = {f.name: values[f.name] for f in fields(section) if f.name in values}
            if own:
                changed[name] = dataclasses.replace(section, **own)
        return dataclasses.replace(self, **changed)  # type: ignore[arg-type]

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """The settings in which ``other`` differs: name to (here, there)."""
        here, there = self.flat(), other.flat()
        return {k: (here.get(k), there.get(k)) for k in sorted(here.keys() | there.keys()) if here.get(k) != there.get(k)}

    def to_toml(self) -> str:
        """The recipe as TOML, one table a section; unset values are left out."""
        document: dict[str, Any] = {"recipe": self.recipe}
        for name, section in self.sections().items():
            table = {"kind": section.kind} if isinstance(section, Kinded) else {}
            document[name] = table | {f.name: v for f in fields(section) if (v := getattr(section, f.name)) is not None}
        return tomli_w.dumps(document)

    @classmethod
    def from_toml(cls, text: str, where: str) -> "Recipe":
        """Reads what `to_toml` writes; what is left out has its default.

        Raises:
            UserError: not TOML, an unknown table, key or kind, or a value outside its range; names ``where``.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{where} is not valid TOML: {error}.") from None
        try:
            return cls._from_document(document)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> "Recipe":
        bases: dict[str, Any] = {
            "data": Data, "network": Network, "objective": Objective,
            "optimizer": Optimizer, "training": Training, "memory": Memory,
        }  # fmt: skip
        if unknown := document.keys() - bases.keys() - {"recipe"}:
            name = min(unknown)
            raise UserError(f"there is no section {name!r} in a recipe: {nearest(name, bases)}")
        sections: dict[str, Any] = {}
        for name, base in bases.items():
            table = document.get(name, {})
            if not isinstance(table, Mapping):
                raise UserError(f"{name!r} must be a table, [{name}].")
            table = dict(table)
            if issubclass(base, Kinded):
                base = base.of(str(table.pop("kind", "dcgan" if name == "network" else "bce")))
            known = {f.name for f in fields(base)}
            for key in table:
                if key not in known:
                    raise UserError(f"there is no key {key!r} in [{name}]: {nearest(key, known)}")
            sections[name] = base(**table)
        return cls(recipe=str(document.get("recipe", "custom")), **sections)


@dataclass(frozen=True, kw_only=True)
class Run(Section):
    """Where and with what a training runs: nothing here changes the numbers it ends with."""

    out: str | None = option(None, "run folder; unset: runs/DATA-RECIPE")
    memory: str | None = option(None, "the most memory to hold, as 2GiB or 800MiB; unset: most of what is free")
    allow_approximate: bool = option(False, "where nothing else fits, micro-batches below 16 under batch norm, and bf16")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: the first of cuda, mps, cpu that is there")
    threads: int | None = option(None, "processor threads; unset: all cores, or as the run was started with", least=1)
    workers: int = option(2, "threads that decode images ahead of training", least=1)
    sample_every: int = option(5, "epochs between two pictures of samples", least=1)
    checkpoint_every: int = option(1, "epochs between two checkpoints", least=1)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", least=1)
    report_every: int = option(50, "updates between two lines of log.jsonl, which also ends each epoch with one", least=1)
    evaluate_every: int = option(0, "epochs between two evaluations, which keep the best checkpoint too; 0: none", least=0)
    evaluate_samples: int = option(2000, "samples of an evaluation while training, and real images as many", least=16)
    metrics: str = option("auto", "what to evaluate by, as swd,frechet_classifier,fid; auto: what needs no download")
    weights: str | None = option(None, "file of Inception's weights, for fid, kid, is, precision and recall")
    tensorboard: bool = option(False, "write curves and samples for TensorBoard into the run folder too")
    accept_changes: bool = option(False, "go on with an existing run although settings differ from those it was started with")


def read(path: Path) -> Recipe:
    """The recipe in a TOML file.

    Raises:
        UserError: the file cannot be read or says something no recipe has.
    """
    try:
        return Recipe.from_toml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}.") from None
