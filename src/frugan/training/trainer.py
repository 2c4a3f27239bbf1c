"""A training from its beginning to its end: session, plan, state, then the loop."""

import gc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from frugan.memory import limit
from frugan.training.checkpoints import begin
from frugan.training.features import learn_features
from frugan.training.holding import peak, updates
from frugan.training.loop import Loop, OnUpdate
from frugan.training.messages import introduce, out_of_memory, unsupported
from frugan.training.observer import Bystander, Observer
from frugan.training.planning import plan_of
from frugan.training.session import Session
from frugan.utils.signals import Signals


class Trainer:
    """One run.

    Args:
        session: what is trained.
        on_update: is called with the number of images seen after every update.

    Attributes:
        loop: once training has begun.
    """

    def __init__(self, session: Session, on_update: OnUpdate | None = None) -> None:
        self.session = session
        self.on_update = on_update
        self.loop: Loop | None = None

    def train(self) -> Path:
        """Trains to the end, from the newest checkpoint if there is one; the run folder.

        Raises:
            UserError: the folder is another's, a file cannot be written, memory ran out, or the training diverged.
            Stopped: by SIGINT or SIGTERM, with everything saved.
        """
        session = self.session
        signals = Signals(quiet=not session.group.leads)
        try:
            with _frozen() as freeze, session.folder, signals, session.arithmetic():
                self._train(signals, freeze)
        except Exception as error:
            if (short := out_of_memory(session, error) or unsupported(session, error)) is None:
                raise
            raise short from None
        finally:
            session.console.stop()
            session.loader.close()
        return session.folder.path

    def _train(self, signals: Signals, freeze: Callable[[], None]) -> None:
        session = self.session
        session.folder.check(session.recipe, session.about(), session.run.accept_changes)
        observer = Observer(
            session.recipe, session.run, session.folder, session.loader, session.name, session.classes, session.console,
            session.device,
        ) if session.group.leads else Bystander()  # fmt: skip
        with closing(observer):
            plan, recipe = session.group.first(lambda: plan_of(session, observer.needs()))
            self.session = session = replace(session, recipe=recipe)
            gc.collect()
            freeze()  # planning imports much
            budget = plan.budget if plan.named else None
            with limit.held_to(budget, session.device, plan.reserved, plan.held), session.apart():
                state = begin(session)
                state.step.whole = session.batch
                session.duration.begin(state.images)  # refuses before anything is written; the loop begins it anew, after features
                loop = Loop(
                    session, budget, state, updates(session, plan, state, observer.event), observer, signals, self.on_update
                )
                resumed = session.folder.claim(session.recipe, session.about() | plan.as_dict(), state.images)
                observer.begin(state.images)
                self.loop = loop
                introduce(session, plan, state.generator, state.discriminator)
                if resumed:
                    session.console.tell(f"Going on from {state.images:,} images.")
                if not session.duration.over(state.images):
                    micro_batch = plan.layouts["G"].micro_batch
                    session.group.first(lambda: learn_features(session, state, micro_batch, plan.held, signals, observer.event))
                    networks = (state.generator, state.discriminator)
                    session.group.give([t for network in networks for t in (*network.parameters(), *network.buffers())])
                    limit.release(session.device)
                    loop.run()
                    loop.finish()
                    if found := peak(session, plan, state.images):
                        session.console.peak(found)
                        observer.event(found)
                else:
                    path, seen = session.folder.path, state.images
                    more = "--minutes" if session.duration.timed else "--epochs"
                    if session.recipe.optimizer.schedule == "cosine":  # `RunFolder.check`
                        more += " with --accept-changes (learning rates rise again)"
                    session.console.tell(f"{path} is already trained for {seen:,} images; more {more} go on.")
                    loop.finish()  # the last time could have been killed before it was


@contextmanager
def _frozen() -> Iterator[Callable[[], None]]:
    """While open, collections do not look at what is there now, which takes them a third of a second; gives what adds to that."""
    own = not gc.get_freeze_count()  # what a program has frozen itself is its own affair
    freeze = gc.freeze if own else lambda: None
    freeze()
    try:
        yield freeze
    finally:
        if own:
            gc.unfreeze()
