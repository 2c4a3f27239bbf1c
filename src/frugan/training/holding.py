"""Holding a plan: goes on in a cheaper way when memory runs out, says so, and compares the peak with what was predicted."""

from collections.abc import Callable
from functools import cache

from frugan.gan.levers import PHASES, jobs, usable
from frugan.memory import limit
from frugan.memory.layout import SMALLEST_COUPLED, Layout
from frugan.memory.plan import Plan
from frugan.memory.recover import Change, Recovery
from frugan.memory.search import Search
from frugan.reporting.records import Event, LayoutChanged, MemoryMeasured
from frugan.training.graphs import Graphs, Programs, State
from frugan.training.session import Session
from frugan.training.traces import Traces


def updates(session: Session, plan: Plan, state: State, note: Callable[[Event], None]) -> Graphs:
    """What updates both networks as ``plan`` says, and goes on in a cheaper way when memory runs out; ``note`` takes in what
    happens."""
    recipe, device, approximate = session.recipe, session.device, session.run.allow_approximate

    def changed(change: Change) -> None:
        """Says and writes down what was changed because memory ran out, or suffices again."""
        cause, folder = change.cause, session.folder
        session.console.tell(
            f"{cause[0].upper()}{cause[1:]} in {change.phase}'s phase after {state.images:,} images; going on with "
            f"{change.change} ({change.guarantee})."
        )
        how = {"phase": change.phase, "change": change.change, "guarantee": str(change.guarantee)}
        note(LayoutChanged(event=cause, images=state.images, **how))
        layouts = {name: layout.as_dict() for name, layout in made.layouts.items()}
        folder.rewrite_plan({"layouts": layouts, "freed_memory": made.freed})

    both = state.generator.couples_samples, state.discriminator.couples_samples
    coupled, four = any(both), state.step.in_four_passes
    least = {p: min(SMALLEST_COUPLED, *layout.sizes) if coupled else 1 for p, layout in plan.layouts.items()}
    traces = Traces(recipe, device)
    known = Search(jobs(recipe, device, both, traces.growth, in_four_passes=four), device)  # finds out nothing yet

    @cache
    def needs(phase: str, layout: Layout) -> int | None:
        """What a layout allocates, if it is known: now is no time to find out."""
        if not traces.knows(phase, layout.levers):
            return None
        job = next(job for job in known.jobs if job.name == phase)
        return known.exact(job, layout).moment.bytes

    made = Recovery(
        [state.generator, state.discriminator], device, plan.layouts, plan.freed,
        levers={p: usable(recipe, p, device, both, four) for p in PHASES},
        smallest=dict.fromkeys(PHASES, 2) if coupled and approximate else least, coupled=coupled, changed=changed, needs=needs,
        planned=plan.planned,
    )  # fmt: skip
    if device.type == "xla":
        return Programs(state, made, device)
    state.step.keeps = plan.keeps
    return Graphs(state, made, device, plan.graphs, session.console.tell, session.group.sum_phase)


def peak(session: Session, plan: Plan, images: int) -> MemoryMeasured | None:
    """Predicted and measured peak, side by side, after ``images`` images; None where nobody measures it."""
    measured = limit.peak(session.device)
    if measured is None:
        return None
    budget = plan.budget if plan.named else None
    host = limit.most() if plan.host else 0
    return MemoryMeasured(
        images=images, predicted=plan.predicted, measured=measured, budget=budget, host_predicted=plan.host, host=host
    )  # fmt: skip
