"""The levers of both phases: which there are, which may be used together, and both phases as the search for a plan sees them.

They are declared in `frugan.config.recipe.Memory`; `frugan.gan.step` does what they say.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from itertools import product
from typing import Any

import torch

from frugan.config.recipe import Memory, Recipe
from frugan.gan.penalties import penalties
from frugan.memory.growth import Growth
from frugan.memory.layout import Guarantee, Layout, Lever, split, uncoupling
from frugan.memory.search import Job, Levers
from frugan.utils.errors import UserError

PHASES = ("D", "G")  # of an update, in their order


def _declared() -> dict[str, tuple[Lever, str]]:
    found = {}
    for f in fields(Memory):
        if about := f.metadata.get("lever"):
            values = {"yes": True, "no": False}
            lever = Lever(
                rung=about["rung"], name=f.name, words=about["words"], guarantee=Guarantee[about["guarantee"].upper()],
                plain=values.get(about["plain"], about["plain"]), used=values.get(about["used"], about["used"]),
                uncouples=about["uncouples"],
            )  # fmt: skip
            found[f.name] = lever, about["phases"]
    return found


_DECLARED = _declared()
LEVERS = {name: lever for name, (lever, _) in _DECLARED.items()}


def of_phase(phase: str) -> Levers:
    """The levers that ``phase`` (D or G) has."""
    return tuple(lever for lever, phases in _DECLARED.values() if phase in phases)


def named(names: Iterable[str]) -> Levers:
    """The levers called ``names``, as a layout has them."""
    return tuple(sorted(LEVERS[name] for name in names))


def read_layout(values: Mapping[str, Any]) -> Layout:
    """A layout as a plan in JSON has it."""
    return Layout.from_dict(values, LEVERS.values())


def parts_of(recipe: Recipe, phase: str) -> int | None:
    """How many micro-batches were asked for in ``phase``."""
    memory = recipe.memory
    return memory.generator_accumulation_steps or memory.accumulation_steps if phase == "G" else memory.accumulation_steps


def allowed(
    recipe: Recipe, phase: str, device: torch.device, coupled: tuple[bool, bool], in_four_passes: bool = False
) -> dict[Lever, tuple[bool, ...]]:  # fmt: skip
    """For each lever of ``phase`` whether it may be left alone and whether it may be used, the plainest first.

    Penalties that are computed in four passes (`frugan.gan.bends`) need no other way by themselves.

    Raises:
        UserError: a lever was asked for that does not go with gradient penalties and batch norm in D. By jvp they would be wrong,
            as torch differentiates the forward derivative of batch norm as if the batch's statistics were constants; under
            statistics of the whole batch, what these carry would have to be differentiated twice. With group norm all is right.
    """
    found: dict[Lever, tuple[bool, ...]] = {}
    penalised = phase == "D" and coupled[1] and bool(penalties(recipe.objective))
    for lever in of_phase(phase):
        asked = getattr(recipe.memory, lever.name)
        found[lever] = (False, True) if asked == "auto" else (asked in (lever.used, "yes"),)
        if lever.name == "offload_activations" and device.type == "cpu":
            found[lever] = (False,)  # they are on the host
        if lever.name == "penalty":
            if not penalties(recipe.objective):
                del found[lever]
            elif penalised and True in found[lever]:
                if asked != "auto":
                    way = "use --norm-d group, or none"
                    raise UserError(f"--penalty jvp would be wrong with batch norm in the discriminator: {way}.")
                found[lever] = (False,)
            elif in_four_passes and asked == "auto":
                found[lever] = (False,)
        if lever.uncouples:
            if penalised and asked == "yes":
                raise UserError(
                    "--whole-batch-norm yes cannot be had together with gradient penalties and batch norm in the discriminator: "
                    "use --norm-d group, or none."
                )
            found[lever] = _uncoupling(recipe, phase) if any(coupled) and not penalised and asked != "no" else (False,)
    return found


def _uncoupling(recipe: Recipe, phase: str) -> tuple[bool, ...]:
    """Whether micro-batches may be computed without, and with, what uncouples them: wherever a batch is cut, with it."""
    parts = parts_of(recipe, phase)
    return (False, True) if parts is None else (parts > 1,)


def variants(
    recipe: Recipe, phase: str, device: torch.device, coupled: tuple[bool, bool], in_four_passes: bool = False
) -> list[Levers]:  # fmt: skip
    """The combinations of levers worth a look, the plainest first.

    What uncouples samples takes several times as long and makes micro-batches of any size possible, so that other levers hardly
    help: it is used alone, or with all of them where memory is least. Penalties by jvp need as much as by double backward until
    blocks are recomputed, and blocks under a double backward are all needed at once: the two are used together or not at all,
    unless one was asked for, or penalties take four passes.
    """
    may = allowed(recipe, phase, device, coupled, in_four_passes)
    made = [tuple(sorted(x for x, used in zip(may, values, strict=True) if used)) for values in product(*may.values())]
    if recipe.memory.checkpoint_blocks == "auto" and len(may.get(LEVERS["penalty"], ())) > 1:
        together = [{lever.name for lever in variant} for variant in made]
        made = [
            v for v, names in zip(made, together, strict=True)
            if ("penalty" in names) == ("checkpoint_blocks" in names)
            and ("separate_terms" in names or "checkpoint_blocks" not in names)
        ]  # fmt: skip
    made.sort(key=len)
    if parts_of(recipe, phase) is None:
        uncoupled = [v for v in made if uncoupling(v)]
        made = [v for v in made if not uncoupling(v) or v in (uncoupled[0], uncoupled[-1])]
    return made


def usable(
    recipe: Recipe, phase: str, device: torch.device, coupled: tuple[bool, bool], in_four_passes: bool = False
) -> Levers:  # fmt: skip
    """The levers of ``phase`` that may be used or not, as memory asks for it."""
    return tuple(lever for lever, values in allowed(recipe, phase, device, coupled, in_four_passes).items() if len(values) > 1)


def keeps_fakes(levers: Iterable[Lever], coupled: bool) -> bool:
    """Whether a phase keeps the generated images of a whole batch that is computed in micro-batches, in place of making them anew
    in each pass through D by which batch norm there takes its statistics, or brings gradients back.

    ``coupled``: whether D has batch norm. Where other levers save memory, this takes none.
    """
    return coupled and [lever.name for lever in levers] == ["whole_batch_norm"]


def jobs(
    recipe: Recipe, device: torch.device, coupled: tuple[bool, bool], trace: Callable[[str, Levers, int], Growth],
    loads: Callable[[str], int] = lambda lever: 0, in_four_passes: bool = False,
) -> list[Job]:  # fmt: skip
    """Both phases, for the search, traced by ``trace``.

    Args:
        recipe: what is trained.
        device: on what.
        coupled: whether a sample's output depends on the others of its micro-batch, in the generator and in the discriminator.
        trace: a phase, its levers, and the samples that must be looked at (`Job`) to what a micro-batch allocates.
        loads: the name of a lever to the bytes besides tensors that come with it.
        in_four_passes: whether gradient penalties are computed so.

    Raises:
        UserError: batch norm was asked to work on single samples.
    """
    batch, smallest = recipe.training.batch_size, 2 if any(coupled) else 1
    if any(coupled) and recipe.memory.whole_batch_norm == "yes":
        smallest = batch  # what is cut is uncoupled
    found = []
    for phase in PHASES:
        parts, ways = parts_of(recipe, phase), variants(recipe, phase, device, coupled, in_four_passes)
        if any(coupled) and (batch < 2 or (not uncoupling(ways[0]) and min(split(batch, parts or 1)) < 2)):
            raise UserError(
                "batch norm cannot train on micro-batches of 1: use a larger --batch-size or fewer --accumulation-steps, "
                "or --norm-g group --norm-d group."
            )
        found.append(Job(
            phase, batch, ways, partial(trace, phase), coupled=any(coupled), smallest=smallest, parts=parts, loads=loads,
            keeps=partial(_kept_a_sample, recipe, phase, coupled[1]),
        ))  # fmt: skip
    return found


def _kept_a_sample(recipe: Recipe, phase: str, coupled: bool, levers: Levers) -> int:
    """Bytes of a generated image, and in G's phase of its gradient, where they are kept."""
    channels, size, _ = recipe.data.shape
    image = channels * size**2 * torch.float32.itemsize
    return keeps_fakes(levers, coupled) * image * (2 if phase == "G" else 1)
