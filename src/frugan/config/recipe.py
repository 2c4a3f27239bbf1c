"""The vocabulary: what to train, as small frozen dataclasses that are validated when built.

Nothing here imports torch, so that the command line answers at once. A `Recipe` is made of sections; every field of every
section has a name of its own across all of them, so that a recipe can also be read and changed flat: the same names are the
flags of the command line, the keyword arguments of `frugan.train` and the keys of ``recipe.toml``.
"""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w

from frugan.config.architectures import Architecture
from frugan.config.augmentation import Augmentation
from frugan.config.classes import Classes
from frugan.config.objectives import Objective
from frugan.config.section import Kinded, Section, lever, option
from frugan.utils.errors import UserError, nearest

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
    flip: Literal["no", "yes", "auto"] = option(
        "no", "mirror half of the images left to right, drawn anew each time; auto: if the images look the same mirrored"
    )

    def __post_init__(self) -> None:
        said: object = self.flip
        if isinstance(said, bool):  # as recipes of earlier versions, and programs, say it
            object.__setattr__(self, "flip", "yes" if said else "no")
        super().__post_init__()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image, once size and channels are known."""
        assert self.channels and self.image_size
        return self.channels, self.image_size, self.image_size


BOTH = "--epochs and --minutes both say how long to train: leave one out."
Choice = Literal["auto", "yes", "no"]  # auto: if the memory there is asks for it


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
    minutes: float | None = option(None, "how long to train by the clock, instead of --epochs", above=0, most=1e6)
    batch_size: int = option(128, "images in one update, however it is cut into micro-batches", least=1, most=1_000_000)
    discriminator_steps: int = option(1, "updates of the discriminator for each of the generator", least=1)
    reuse_fakes: bool = option(
        False, "G learns from the generated images that D has just seen, so that one pass can make them for both"
    )
    ema_half_life: float = option(
        10_000, "images after which the averaged generator has forgotten half; 0: do not average", least=0
    )
    conditional: bool = option(False, "learn the classes of the images too, so that each can be asked for (needs labels)")
    class_sampling: Literal["natural", "balanced"] = option(
        "natural", "classes that generated images have in training: as often as the data has them, or all equally often"
    )
    seed: int = option(0, "the same seed gives the same training", least=0)
    init_from: str | None = option(None, "run folder whose weights to start from (fine-tuning)")
    freeze_d: int = option(0, "first blocks of the discriminator that stay as they are when fine-tuning", least=0)


@dataclass(frozen=True, kw_only=True)
class Memory(Section):
    """How the arithmetic is laid out: what changes more than rounding says approximate."""

    accumulation_steps: int | None = option(
        None, "micro-batches that the discriminator's batch is cut into; unset: as few as fit", least=1
    )
    generator_accumulation_steps: int | None = option(
        None, "micro-batches that the generator's batch is cut into; unset: as the discriminator's, or as few as fit", least=1
    )
    separate_terms: Choice = lever(
        "separate terms", "reassociation", "D", 1, "one backward for real images, then one for generated ones"
    )
    penalty: Literal["auto", "double-backward", "jvp"] = lever(
        "penalties by jvp", "reassociation", "D", 2,
        "how gradient penalties are differentiated; auto: in four passes where D is linear but for leaky ReLUs; "
        "jvp: forwards, which takes less together with the next",
        used="jvp", plain="double-backward",
    )  # fmt: skip
    checkpoint_blocks: Choice = lever(
        "blocks recomputed", "bitwise", "DG", 2, "keep the inputs of each block alone and compute it again in backward"
    )
    recompute_generator: Choice = lever(
        "generator recomputed", "bitwise", "G", 1, "run G again for its backward, so that it is not held beside D"
    )
    offload_activations: Choice = lever(
        "activations on the host", "bitwise", "DG", 3, "what backward needs waits on the host, on accelerators"
    )
    whole_batch_norm: Choice = lever(
        "batch norm over the whole batch", "reassociation", "DG", 4,
        "in micro-batches, batch norm takes its statistics from the whole batch, in passes of their own; no: from each alone",
        uncouples=True,
    )  # fmt: skip
    offload_state: Choice = option(
        "auto", "moments and the averaged generator wait on the host (bitwise; accelerators); auto: where nothing fits otherwise"
    )
    in_place: bool = option(True, "activations overwrite what they are applied to (bitwise)")
    lean_adam: bool = option(True, "Adam keeps no first moment where beta1 is 0 (reassociation)")
    moments: Literal["fp32", "8bit"] = option("fp32", "how Adam keeps its moments; 8bit needs torchao (approximate)")
    precision: Literal["fp32", "tf32", "bf16", "fp16", "auto"] = option(
        "fp32", "arithmetic inside the networks; auto: bf16 or fp16 where the device is fast at it (all but fp32 approximate)"
    )
    channels_last: bool = option(
        True, "lay images out with the channels innermost: faster convolutions, some by products of matrices"
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what is trained. Built by the functions of `frugan.config.recipes`, changed by `replace`.

    ``classes`` is no setting: it is what a conditional training finds in its images.
    """

    recipe: str
    data: Data = Data()
    network: Architecture
    objective: Objective
    augmentation: Augmentation = Augmentation()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    memory: Memory = Memory()
    classes: Classes = Classes()

    def sections(self) -> dict[str, Section]:
        """The sections by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("recipe", "classes")}

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
            UserError: a name that no section has (with the nearest), a value outside its range, or two that exclude each other.
        """
        if "epochs" in values and values.setdefault("minutes") is not None:
            raise UserError(BOTH)
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

    def idle(self) -> list[str]:
        """A sentence for each setting that was changed, and that nothing looks at."""
        schedule, augment = self.optimizer.schedule, self.augmentation.augment
        penalised = any(getattr(self.objective, name, 0) for name in ("r1", "r2", "gradient_penalty"))
        needs = {
            "augment_policy": (augment != "none", "--augment"),
            "ada_target": (augment == "ada", "--augment ada"),
            "ada_images": (augment == "ada", "--augment ada"),
            "schedule_epochs": (schedule in ("step", "exponential"), "--schedule step or exponential"),
            "schedule_factor": (schedule in ("step", "exponential", "plateau"), "--schedule step, exponential or plateau"),
            "schedule_patience": (schedule == "plateau", "--schedule plateau"),
            "penalty": (penalised, "a gradient penalty, as --r1 is"),
        }
        return [sentence for section in self.sections().values() for sentence in section.idle(needs)]

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
        if self.classes:
            document["classes"] = vars(self.classes)
        return tomli_w.dumps(document)

    @classmethod
    def from_toml(cls, text: str, where: str, named: "Mapping[str, Callable[[], Recipe]] | None" = None) -> "Recipe":
        """Reads what `to_toml` writes; what is left out has its default.

        Args:
            text: of the file.
            where: it is from.
            named: recipes by their names; a text without a table for the network says what differs from the one it names.

        Raises:
            UserError: not TOML, an unknown table, key, kind or recipe, or a value outside its range; names ``where``.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{where} is not valid TOML: {error}.") from None
        try:
            name = str(document.get("recipe", "custom"))
            if not named or "recipe" not in document or "network" in document:
                plain = cls(recipe=name, network=Architecture.of("dcgan")(), objective=Objective.of("bce")())
                return cls._from_document(document, plain)
            if name not in named:
                raise UserError(f"there is no recipe called {name!r}: {nearest(name, named)}")
            return cls._from_document(document, named[name]())
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def _from_document(cls, document: dict[str, Any], otherwise: "Recipe") -> "Recipe":
        bases: dict[str, Any] = {
            "data": Data, "network": Architecture, "objective": Objective, "augmentation": Augmentation,
            "optimizer": Optimizer, "training": Training, "memory": Memory, "classes": Classes,
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
            section = getattr(otherwise, name)
            if issubclass(base, Kinded):
                base = base.of(str(table.pop("kind", section.kind)))
            known = {f.name for f in fields(base)}
            for key in table:
                if key not in known:
                    raise UserError(f"there is no key {key!r} in [{name}]: {nearest(key, known)}")
            sections[name] = dataclasses.replace(section, **table) if type(section) is base else base(**table)
        return cls(recipe=otherwise.recipe, **sections)


def read(path: Path, named: Mapping[str, Callable[[], Recipe]] | None = None) -> Recipe:
    """The recipe in a TOML file; ``named`` as in `Recipe.from_toml`.

    Raises:
        UserError: the file cannot be read or says something no recipe has.
    """
    try:
        return Recipe.from_toml(path.read_text(encoding="utf-8"), str(path), named)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read the recipe {path}: {reason}.") from None
