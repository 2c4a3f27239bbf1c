"""A GAN's side of planning: its two phases, what happens between them, and what its process holds besides."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from frugan.config.recipe import Recipe
from frugan.gan.levers import PHASES, jobs
from frugan.memory import limit
from frugan.memory.budget import AHEAD, MARGIN, Beside, BudgetPlanner, Process
from frugan.memory.budget import TooLittle as TooLittle
from frugan.memory.layout import SMALLEST_COUPLED, Layout
from frugan.memory.plan import Plan
from frugan.memory.search import Search
from frugan.reporting.album import GRID
from frugan.training.traces import Traces
from frugan.utils.units import size

BUILT = 512 << 20  # bytes of networks that are built whatever the budget is: importing torch takes as much


class Planner:
    """Plans trainings of ``recipe`` (resolved) on ``device``.

    Args:
        recipe: what is trained.
        device: on what.
        data: bytes of images that training will hold besides what the process holds already.
        evaluation: bytes that an evaluation takes, between two epochs.
        memory: the budget, as said.
        approximate: whether batch norm may work on micro-batches below `SMALLEST_COUPLED`.
        let_go: is called where nothing fits beside images that are kept in memory; gives them up, and says whether there were any.
        separate: whether what must be run for a plan is run by another process (`Traces`).
        beside: how many processes share what is free, this one with them.
        before: another planner of this process, before it had planned anything: what was held then counts.

    Raises:
        UserError: the budget says nothing, is more than the machine has, or cannot be held on this device; or networks alone
            take more than it.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, *, data: int = 0, evaluation: int = 0, memory: str | None = None,
        approximate: bool = False, let_go: Callable[[], bool] | None = None, separate: bool = False, beside: int = 1,
        before: "Planner | None" = None,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.device = device
        named = limit.budget(memory, device)
        self.let_go = let_go
        self.approximate = approximate
        # In this process, without what planning leaves in it.
        self._before: int = before._before if before else limit.baseline(device)
        self._most: int = before._most if before else limit.most() if device.type == "cpu" else 0
        self.traces = Traces(recipe, device, separate=separate and named is not None)
        self._check_networks(named, limit.spare(device) // beside)
        try:
            self.facts = self.traces.facts
            self.coupled = self.facts.coupled_g, self.facts.coupled_d
            traces, four = self.traces, self.facts.in_four_passes
            found = jobs(recipe, device, self.coupled, traces.growth, traces.loads, four)
            search = Search(found, device, approximate=approximate)
        except BaseException:
            self.traces.close()
            raise
        moments = {"evaluating": self.facts.held | {"evaluation": evaluation}} if evaluation else {}
        self.budget = BudgetPlanner(
            search, device, named, self._process, lambda: limit.spare(device) // beside, data, self._besides, moments,
            self._let_go if let_go else None,
        )  # fmt: skip

    def plan(self) -> Plan:
        """The fastest plan that fits.

        Raises:
            UserError: none does; names the smallest budget that would do, and what binds it.
        """
        try:
            if self.device.type != "cpu":
                self.traces.warm_up()
                self.budget.prepare()
            if self.budget.moments and self.budget.named is not None:
                self._check_evaluating(self.budget.named)
            return self._with_host(self._keeping(self.budget.plan()))
        except TooLittle as error:
            raise self._reworded(error) from None
        finally:
            self.traces.close()

    def with_layouts(self, layouts: dict[str, Layout], freed: Any) -> Plan | None:
        """The plan with these layouts, if it fits."""
        try:
            plan = self.budget.with_layouts(layouts, freed)
            return plan and self._with_host(self._keeping(plan))
        finally:
            self.traces.close()

    def _keeping(self, plan: Plan) -> Plan:
        """``plan`` with the graph of generated images held through D's phase, for G's, where there is room for it.

        On the CPU alone: a CUDA graph of each phase makes its own images, and on other devices it is unrun.
        """
        training, whole = self.recipe.training, all(len(layout.sizes) == 1 for layout in plan.layouts.values())
        wanted = training.reuse_fakes and training.discriminator_steps == 1 and self.recipe.memory.moments == "fp32"
        if not wanted or not whole or plan.layouts["G"].levers or self.device.type != "cpu":
            return plan
        kept = self.traces.kept().timeline((training.batch_size,)).left()
        search, candidate = self.budget.search, self.budget.choice.chosen["D"]
        timeline = self.budget.timelines()["D"][0].beside(kept)
        held = max(plan.held, search.holds([timeline], plan.freed) + candidate.loads)
        if plan.framework + plan.data + held + MARGIN > plan.budget:
            return plan
        self.budget.kept, moment = {"D": kept}, timeline.peak()
        parts = plan.phases["D's phase"] | moment.parts | {"workspaces": moment.workspace}
        return replace(plan, keeps=True, held=held, phases=plan.phases | {"D's phase": parts})

    def _with_host(self, plan: Plan) -> Plan:
        """``plan`` with what is held on the host besides: libraries, what waits there, plots and pictures; on accelerators."""
        if self.device.type == "cpu":
            return plan
        self.traces.close()
        plots = 0 if "matplotlib.figure" in sys.modules else self.traces.plots()[0]
        pictures = 2 * GRID * math.prod(self.recipe.data.shape)
        return replace(plan, host=limit.at_rest(torch.device("cpu")) + plots + pictures + self.facts.waiting)

    def _process(self) -> Process:
        if self.device.type != "cpu":
            self.traces.close()  # whose networks would be counted
            return Process(limit.baseline(self.device), now=self._before)
        facts = self.facts
        # Importing torch takes more than some trainings do afterwards.
        begun = self._most + AHEAD if self._most else 0
        return Process(self._before + facts.loaded, facts.loaded_each, begun, self._before, facts.reserved, facts.reserved_each)

    def _besides(self, micro_batch: int) -> dict[str, Beside]:
        """What happens between phases, while no gradients are there, but for evaluations."""
        pictures = 2 * GRID * math.prod(self.recipe.data.shape) if self.device.type == "cpu" else 0
        sampling = self.traces.sampling(micro_batch if self.device.type != "cpu" else 0)
        found = {"samples": Beside(sampling.timeline((micro_batch,)), {"pictures": pictures})}
        if self.recipe.memory.moments != "fp32":  # else Adam allocates nothing, offloaded moments have memory of their own
            updates = [self.traces.updating(phase).timeline((1,)) for phase in PHASES]
            found["update"] = Beside(max(updates, key=lambda t: t.peak().bytes), {})
        if self.recipe.network.learns_features:  # in micro-batches as large as what is planned for the rest allows
            found["features"] = Beside(self.traces.features().timeline((1,)), {})
        return found

    def _let_go(self) -> bool:
        gone = bool(self.let_go and self.let_go())
        if gone:
            self._before = min(self._before, limit.baseline(self.device))
        return gone

    def _check_networks(self, named: int | None, spare: int) -> None:
        """Refuses networks that cannot be trained before they are built, which would take that memory already.

        Where they take as little as the framework does they are built, and the refusal then names the smallest budget.
        """
        held = self.traces.least()
        least = sum(held.values())
        if least <= (spare if named is None else max(named, BUILT)):
            return
        said = f"the {size(spare)} that are free are" if named is None else f"--memory {size(named)} is"
        more = math.ceil((least + self._before) / limit.MIB)  # activations are still to come
        way = "" if named is None else f", or a --memory well above {more}MiB"
        raise TooLittle(
            f"{said} too little for these networks: weights with gradients, moments and average alone take {size(least)}, "
            f"most of it {max('DG', key=held.__getitem__)}'s; choose a smaller --image-size or a smaller network{way}.",
            least,
        )

    def _check_evaluating(self, named: int) -> None:
        needs = self._process().framework() + self.budget.data + MARGIN + sum(self.budget.moments["evaluating"].values())
        if needs > named:
            raise TooLittle(
                f"--memory {size(named)} is too little to evaluate while training: that takes --memory "
                f"{math.ceil(needs / limit.MIB)}MiB; leave --evaluate-every out, and use frugan evaluate afterwards.",
                needs,
            )

    def _reworded(self, error: TooLittle) -> TooLittle:
        """The same with the flags of the command line."""
        if not (shortage := error.shortage):
            return error
        said = f"--memory {size(shortage.budget)}" if shortage.named else f"the {size(shortage.budget)} that are free"
        coupled = any(job.coupled and not job.can_uncouple for job in self.budget.search.jobs)
        lifted = [f"micro-batches below {SMALLEST_COUPLED} under batch norm"] if coupled else []
        lifted += ["bf16"] if self.recipe.memory.precision == "fp32" else []
        way = f" (--allow-approximate also takes {' and '.join(lifted)})" if lifted and not self.approximate else ""
        return TooLittle(shortage.sentence(said, "--memory ", way), error.smallest)

    def images_per_second(self, plan: Plan) -> float:
        """About how fast ``plan`` trains here: the first micro-batch of each phase is run and timed."""
        return self.recipe.training.batch_size / self.traces.seconds(plan.layouts, plan.freed, keeps=plan.keeps)
