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
from frugan.memory.layout import Guarantee, Layout, Lever, split
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


def allowed(recipe: Recipe, phase: str, device: torch.device, coupled_d: bool) -> dict[Lever, tuple[bool, ...]]:
    """For each lever of ``phase`` whether it may be left alone and whether it may be used, the plainest first.

    Raises:
        UserError: penalties by jvp were asked for with batch norm in D, whose forward derivative torch differentiates as if the
            batch's statistics were constants; with group norm it is right.
    """
    found: dict[Lever, tuple[bool, ...]] = {}
    for lever in of_phase(phase):
        asked = getattr(recipe.memory, lever.name)
        found[lever] = (False, True) if asked == "auto" else (asked in (lever.used, "yes"),)
        if lever.name == "offload_activations" and device.type == "cpu":
            found[lever] = (False,)  # they are on the host
        if lever.name == "penalty":
            if not penalties(recipe.objective):
                del found[lever]
            elif coupled_d and True in found[lever]:
                if asked != "auto":
                    way = "use --norm-d group, or none"
                    raise UserError(f"--penalty jvp would be wrong with batch norm in the discriminator: {way}.")
                found[lever] = (False,)
    return found


def variants(recipe: Recipe, phase: str, device: torch.device, coupled_d: bool) -> list[Levers]:
    """The combinations of levers worth a look, the plainest first.

    Penalties by jvp need as much as by double backward until blocks are recomputed, and blocks under a double backward are all
    needed at once: the two are used together or not at all, unless one was asked for.
    """
    may = allowed(recipe, phase, device, coupled_d)
    made = [tuple(sorted(x for x, used in zip(may, values, strict=True) if used)) for values in product(*may.values())]
    if recipe.memory.checkpoint_blocks == "auto" and len(may.get(LEVERS["penalty"], ())) > 1:
        together = [{lever.name for lever in variant} for variant in made]
        made = [
            v for v, names in zip(made, together, strict=True)
            if ("penalty" in names) == ("checkpoint_blocks" in names)
            and ("separate_terms" in names or "checkpoint_blocks" not in names)
        ]  # fmt: skip
    return sorted(made, key=len)


def usable(recipe: Recipe, phase: str, device: torch.device, coupled_d: bool) -> Levers:
    """The levers of ``phase`` that may be used or not, as memory asks for it."""
    return tuple(lever for lever, values in allowed(recipe, phase, device, coupled_d).items() if len(values) > 1)


def jobs(
    recipe: Recipe, device: torch.device, coupled: tuple[bool, bool], trace: Callable[[str, Levers], Growth],
    loads: Mapping[str, int] | None = None,
) -> list[Job]:  # fmt: skip
    """Both phases, for the search, traced by ``trace`` .

    Args:
        recipe: what is trained.
        device: on what.
        coupled: whether a sample's output depends on the others of its micro-batch, in the generator and in the discriminator.
        trace: a phase and its levers to what a micro-batch allocates.
        loads: bytes besides tensors that come with levers, by their names.

    Raises:
        UserError: batch norm was asked to work on single samples.
    """
    memory, batch = recipe.memory, recipe.training.batch_size
    either, coupled_d = any(coupled), coupled[1]
    parts = {"D": memory.accumulation_steps, "G": memory.generator_accumulation_steps or memory.accumulation_steps}
    if either and min(min(split(batch, count or 1)) for count in parts.values()) < 2:
        raise UserError(
            "batch norm cannot train on micro-batches of 1: use a larger --batch-size or fewer --accumulation-steps, "
            "or --norm-g group --norm-d group."
        )
    return [
        Job(
            phase, batch, variants(recipe, phase, device, coupled_d), partial(trace, phase), coupled=either,
            smallest=2 if either else 1, parts=parts[phase], loads=loads or {},
        )
        for phase in PHASES
    ]  # fmt: skip
