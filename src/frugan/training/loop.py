"""The loop of a training: one update after the other, and what is done between them."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from frugan.memory import limit
from frugan.reporting.records import DurationDecided, Line
from frugan.training.checkpoints import mend, save, save_generator
from frugan.training.graphs import Graphs
from frugan.training.messages import diverged
from frugan.training.observer import Bystander
from frugan.training.session import Session
from frugan.training.state import Labels, Mean, State, Terms
from frugan.utils.errors import UserError
from frugan.utils.signals import Signals, Stopped

OnUpdate = Callable[[int], None]


class Loop:
    """Trains ``state`` to the end of ``session``.

    Args:
        session: what is trained.
        budget: bytes that the process may hold, if a person named them.
        state: all that changes.
        graphs: updates networks, and goes on where memory runs out.
        observer: looks at it as it goes.
        signals: that may ask it to stop.
        on_update: is called with the number of images seen after every update.
    """

    def __init__(
        self, session: Session, budget: int | None, state: State, graphs: Graphs, observer: Bystander, signals: Signals,
        on_update: OnUpdate | None = None,
    ) -> None:  # fmt: skip
        self.session = session
        self.budget = budget
        self.state = state
        self.graphs = graphs
        self.recovery = graphs.recovery
        self.observer = observer
        self.signals = signals
        self.on_update = on_update
        self.mean = Mean()
        self.measured: dict[str, float] = {}
        self._clock, self._clock_images = 0.0, state.images
        self._looking = 0.0  # seconds of the clock that `_pause` took

    def run(self) -> None:
        """Trains to the end.

        Raises:
            UserError: a file cannot be written, images cannot be reached any more, or the training diverged.
            Stopped: a signal came, and the state was saved.
        """
        session, state, loader, duration = self.session, self.state, self.session.loader, self.session.duration
        self._clock, self._clock_images = time.monotonic(), state.images
        duration.begin(state.images)
        session.console.start(state.images, duration.total)
        while not duration.over(state.images):
            drawn = state.images
            terms, labels = self.advance()
            decided = self._decided(state.images)
            ended = state.images // len(loader) > drawn // len(loader)
            within = state.images % len(loader) // session.batch  # updates of this epoch, so that a resumed log is the same
            last = duration.over(state.images)
            if ended or last or (within and within % session.run.report_every == 0):
                self._report(self._scores(terms, drawn, labels))
            if last or session.console.due():
                session.console.progress(self._line(self.measured), duration.total, duration.epochs, self.budget)
            if ended:
                self._end_epoch(state.images // len(loader))
            self._pause(ended, last, decided)
            if self.on_update:
                self.on_update(state.images)
            if (signal := self._signal()) and not last:
                save(session, state)
                raise Stopped(signal, state.images)

    def advance(self) -> tuple[Terms, Labels]:
        """One update: every phase whose turn it is, then the average; what was measured, and the labels of the batch.

        Raises:
            UserError: images cannot be reached any more; everything until now is saved.
        """
        session, state = self.session, self.state
        share = session.share
        first = state.images + share.begin
        state.set_rates(state.images / len(session.loader), session.duration.share(state.images))
        try:
            batch = self.recovery.again(partial(session.loader.pieces, first, share.count))
        except UserError:  # nothing of this update has happened yet
            save(session, state)
            raise
        terms: Terms = {}
        for phase in state.phases.values():
            if (state.updates + 1) % phase.every == 0:
                terms |= self.graphs.update(phase, batch, first)
        self.recovery.again(partial(self._take_in, terms))
        self.graphs.end()
        state.images += session.batch
        state.updates += 1
        return terms, batch.labels

    def _decided(self, images: int) -> DurationDecided | None:
        """What the clock of the first process decides after ``images`` images."""
        duration, group = self.session.duration, self.session.group
        decided = duration.look(images) if group.leads else None
        decision = group.most(duration.decision(decided))
        if not group.leads:
            duration.follow(*decision)
        return decided

    def _signal(self) -> int:
        """The signal that a process was sent, or 0."""
        return int(*self.session.group.most([self.signals.received or 0]))

    def _take_in(self, terms: Terms) -> None:
        """Means, the average if G has moved, and how often D's images are augmented: what allocates comes before what changes."""
        state, batch = self.state, self.session.batch
        means = [(mean, mean.plus(terms)) for mean in (self.mean, state.epoch_mean)]
        signs = state.adaptation.plus(terms) if state.adaptation else None
        if state.ema and "Loss_G" in terms:
            state.ema.update(state.generator, batch * state.phases["G"].every, state.images + batch)
        for mean, sums in means:
            mean.take_in(sums)
        if state.adaptation and signs is not None:
            state.adaptation.take_in(signs)

    def _scores(self, terms: Terms, first: int, labels: Labels) -> dict[str, float]:
        """D's scores of generated images before and after the update of both, if both were updated."""
        if "Loss_G" not in terms:
            return {}
        layout, group = self.recovery.layouts["G"], self.session.group
        first += self.session.share.begin
        after = self.recovery.again(lambda: self.state.step.score_generated(first, layout, labels))
        after = group.sum_terms({"after": after})["after"]
        return {"D(G(z)) before": float(terms["D(G(z))"]), "D(G(z)) after": float(after)}

    def _report(self, scores: dict[str, float]) -> None:
        state = self.state
        measured = self.mean.take() | scores
        if not self.session.group.leads:
            return
        # fp16 overflows now and then: the scaler skips the update and lowers its scale, at worst until nothing is left of it.
        skipping = state.scaler.is_enabled() and state.scaler.get_scale() >= 1
        for name, value in list(measured.items()):
            if not math.isfinite(value):
                if not skipping:
                    raise diverged(self.session, state.images, name, state.scaler.is_enabled())
                del measured[name]
        self.measured = measured
        mend(self.session)
        self.observer.line(self._line(measured))

    def _line(self, measured: dict[str, float]) -> Line:
        """How far training is, how fast it goes, and what was measured."""
        state, session = self.state, self.session
        images, seconds = state.images - self._clock_images, max(time.monotonic() - self._clock, 1e-9)
        return Line(
            images=state.images, epoch=state.images / len(session.loader), updates=state.updates,
            speed=images / max(seconds - self._looking, 1e-9), looking=self._looking / seconds,
            seconds_left=session.duration.left(state.images, images / seconds), memory=limit.held(session.device),
            measured=measured, **state.rates(),
        )  # fmt: skip

    def _end_epoch(self, number: int) -> None:
        state, session = self.state, self.session
        means = state.epoch_mean.take()
        if session.recipe.optimizer.schedule == "plateau":
            state.plateau_d.step(means["Loss_D"])
            if "Loss_G" in means:
                state.plateau_g.step(means["Loss_G"])
        session.console.epoch(self._line(self.measured | means), number, session.duration.epochs)

    def _pause(self, ended: bool, last: bool, decided: DurationDecided | None) -> None:
        """What is looked at, saved and said between two updates, of which the first may have ``ended`` an epoch, or be the last."""
        session, state, run, duration = self.session, self.state, self.session.run, self.session.duration
        pictures, checkpoint = duration.due()
        if not (ended or last or pictures or checkpoint or decided):
            return
        began, length = time.monotonic(), len(session.loader)
        epoch = state.images // length if ended else state.images / length
        pictures = pictures or epoch % run.sample_every == 0 or (last and duration.timed)
        is_best = (ended or pictures) and self.observer.look(epoch, state.images, state.updates, self.sample, pictures, last)
        checkpoint = checkpoint or epoch % run.checkpoint_every == 0 or is_best or last or decided is not None
        if checkpoint:
            save(session, state)
        if is_best:
            session.folder.keep_best()
        if decided:  # a checkpoint has it now
            self.observer.event(decided)
            session.folder.rewrite_plan({"updates": decided.total // session.batch})
            session.console.tell(f"{decided.total:,} images, {duration.epochs:.3g} epochs, are {duration.words} at this speed.")
        limit.release(session.device)
        duration.done(pictures, checkpoint)
        self._looking += time.monotonic() - began

    def finish(self) -> None:
        """Everything that stands at the end of a run."""
        save_generator(self.session, self.state)
        self.observer.finish(self.sample)

    def sample(self, seed: int, first: int, count: int, classes: Sequence[int] = ()) -> Tensor:
        """Images of the averaged generator, of ``classes`` in turn if any: uint8 ``[count, c, h, w]``."""
        limit.release(self.session.device)
        return self.state.sample(seed, first, count, self.recovery.layouts["G"].micro_batch, classes)
