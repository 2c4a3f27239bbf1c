"""The plan of a run, or of a training that is not begun: the first that fits of the ways that are allowed."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from frugan.config.recipe import Recipe
from frugan.data.opening import Source, bytes_of, keepable
from frugan.gan.levers import LEVERS
from frugan.memory import limit
from frugan.memory.plan import Guarantee, Plan
from frugan.training.asked import as_asked, check_known, knows
from frugan.training.graphs import with_graphs
from frugan.training.planner import Planner, TooLittle
from frugan.training.session import Session, resolved
from frugan.utils.device import arithmetic


def find(recipe: Recipe, device: torch.device, *, approximate: bool = False, **options: Any) -> tuple[Planner, Plan]:
    """The planner of ``recipe`` (resolved), and its plan.

    Where nothing fits, moments and average wait on the host if they may, and then bf16 is taken if ``approximate`` allows it. The
    arguments are the `Planner`'s, and so are the errors.
    """
    ways = [recipe]
    if recipe.memory.offload_state == "auto" and device.type != "cpu":
        ways.append(recipe.replace(offload_state="yes"))
    if approximate and recipe.memory.precision == "fp32":
        ways += [way.replace(precision="bf16") for way in ways]
    refused: TooLittle | None = None
    planner: Planner | None
    for way in ways:
        try:
            with limit.within_free(device):
                planner = Planner(way, device, approximate=approximate, **options)
                plan = planner.plan()
            rounded = way.memory.precision != recipe.memory.precision
            return planner, replace(plan, guarantee=Guarantee.APPROXIMATE) if rounded else plan
        except TooLittle as error:
            refused = error if refused is None or error.smallest < refused.smallest else refused
        planner = None  # goes, with what it measured
    assert refused
    raise refused


def plan_of(session: Session, evaluation: int) -> tuple[Plan, Recipe]:
    """The plan of a run, and its recipe as planned: the plan it was started with if that still fits, so that it goes on as it was.

    Args:
        session: the run.
        evaluation: bytes that evaluating takes, between two epochs.

    Raises:
        UserError: nothing fits; names the smallest budget that would do.
    """
    run, loader, folder, share = session.run, session.loader, session.folder, session.share.count
    if not knows(session.device):
        return as_asked(session.recipe, session.device), session.recipe
    recipe = session.recipe.replace(batch_size=share)
    options: dict[str, Any] = {"data": loader.ahead(share), "memory": run.memory, "evaluation": evaluation}
    options |= {"approximate": run.allow_approximate, "separate": True, "beside": session.group.here}
    graphs = run.cuda_graphs if session.group.size == 1 else "no"  # gradients are exchanged between phases and updates
    saved = folder.saved_plan() if folder.newest_checkpoint() else {}
    if "layouts" in saved:
        begun = Plan.from_dict(saved, LEVERS.values())
        if all(sum(layout.sizes) == share for layout in begun.layouts.values()):
            planner = Planner(recipe, session.device, **options)
            plan = planner.with_layouts(begun.layouts, begun.freed)
            if plan is not None:
                return replace(_in_this_process(plan, planner, graphs), planned=begun.planned), session.recipe
            session.console.tell("The plan this run was started with does not fit any more; planning anew.")
    planner, plan = find(recipe, session.device, let_go=loader.let_go, **options)
    return _in_this_process(plan, planner, graphs), planner.recipe.replace(batch_size=session.batch)


def _in_this_process(plan: Plan, planner: Planner, graphs: str) -> Plan:
    """``plan`` with what planning has left in this process, if it was made here, as on the CPU without a named budget; and with
    CUDA graphs.

    The code that planning ran is counted: training runs it too.
    """
    if planner.device.type != "cpu":
        return with_graphs(plan, planner.recipe, graphs, planner.device)
    if plan.named:
        return plan
    ahead = planner.facts.loaded_each + (0 if "matplotlib.figure" in sys.modules else planner.traces.plots()[0])
    return replace(plan, framework=max(plan.framework, limit.at_rest(planner.device) + ahead))


@dataclass(frozen=True)
class Proposal:
    """A training that is not begun, and how it may be planned.

    Args:
        recipe: what is trained, resolved.
        source: its images.
        device: on what.
        memory: the budget, as said.
        approximate: whether what changes results may be done where nothing else fits.
    """

    recipe: Recipe
    source: Source
    device: torch.device
    memory: str | None
    approximate: bool

    def plan(self, batch: int | None = None, before: Planner | None = None) -> tuple[Planner, Plan]:
        """Its planner and plan; with batches of ``batch`` if that is said, in a process as ``before`` found it.

        Raises:
            UserError: as for a training.
        """
        recipe = self.recipe.replace(batch_size=batch) if batch else self.recipe
        with arithmetic(recipe.memory.precision, self.device), limit.seldom_collected():  # refuses what the device has not
            keep = keepable(limit.budget(self.memory, self.device), self.device)
            held = bytes_of(self.source, recipe.data, recipe.training.batch_size, keep)
            let_go = (lambda: True) if self.source.random_access and held else None
            planner, plan = find(
                recipe, self.device, data=held, memory=self.memory, approximate=self.approximate, let_go=let_go,
                before=before,
            )  # fmt: skip
            return planner, with_graphs(plan, planner.recipe, "auto", self.device)


def proposed(
    recipe: Recipe, device: torch.device, tell: Callable[[str], None], *, memory: str | None, approximate: bool
) -> Proposal:
    """A training of ``recipe`` that is not begun, to be planned.

    Raises:
        UserError: its images are not there, or cannot be read; or nobody can say what it takes.
    """
    check_known(device)
    return Proposal(*resolved(recipe, device, tell), device, memory, approximate)
