"""The features that a projected discriminator is built on: from the cache, or learnt before the first update."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from frugan.gan.features import Course, FeatureStep, feature_step
from frugan.memory import limit
from frugan.reporting.records import Event, FeaturesLearnt
from frugan.training.session import Session
from frugan.training.state import State
from frugan.training.traces import Traces
from frugan.utils import checkpoint
from frugan.utils.errors import UserError
from frugan.utils.files import cache_folder, cached
from frugan.utils.signals import Signals, Stopped

T = TypeVar("T")

VERSION = 3  # of the encoder and of how it learns, to the last bit
LAST = 50  # updates of which the mean loss is told


def learn_features(
    session: Session, state: State, micro_batch: int, held: int, signals: Signals, note: Callable[[Event], None]
) -> None:
    """Has the frozen features of D learnt, if it is built on any and training has not begun.

    They come from the cache if the same images were learnt in the same way on a machine of the same kind: the same bits. A run that
    goes on has them in its checkpoint; one that starts from another run has that run's, if they fit.

    Args:
        session: of the run.
        state: of the run.
        micro_batch: the most images at a time, as in G's phase.
        held: bytes that training holds at most, by its plan: what is learnt takes no more, if that can be.
        signals: that may ask to stop.
        note: takes in what came of it.

    Raises:
        UserError: learning diverged.
        Stopped: a signal came; nothing is saved, as nothing of the training has happened yet.
    """
    if state.images or state.has_features:
        return
    recipe, loader, tell = session.recipe, session.loader, session.console.tell
    learner = feature_step(recipe, state.discriminator, state.step, session.classes)
    if learner is None:
        return
    began, task = time.monotonic(), learner.options.features
    course = Course.of(learner.options, recipe.training, learner.size, loader.at_hand, len(loader))
    micro_batch = _fitting(session, held, min(micro_batch, course.batch))
    file = _file(session, learner, course, micro_batch)
    told = _known(learner, file)
    found = told is not None
    if told is None:
        if course.updates:
            tell(f"Features of these images are learnt first, from {'labels and rotations' if task == 'both' else task}.")
        learner.begin()
        loss, fitted = _learnt(session, learner, course, micro_batch, signals)
        held_out, begun = loader.pieces(0, course.held_out), loader.pieces(0, course.batch)
        right, fitted = _fitted(session.device, lambda count: learner.examine(held_out, course, count), fitted)
        told = {"loss": loss, "accuracy": right}
        as_learnt = {name: tensor.clone() for name, tensor in learner.encoder.state_dict().items()}

        def calibrate(count: int) -> None:
            learner.encoder.load_state_dict(as_learnt)  # where it ran out of memory, some levels are scaled already
            learner.calibrate(begun, course.batch, count)

        _, fitted = _fitted(session.device, calibrate, fitted)
        if fitted == micro_batch:  # else it is not to the last bit what would be learnt where memory suffices
            _keep(learner, file, told)
    event = FeaturesLearnt(images=0, task=task, updates=course.updates, seconds=time.monotonic() - began, found=found, **told)
    note(event)
    about = ", ".join(f"right about the {name} of {share:.1%} of images held out" for name, share in event.accuracy.items())
    tell(f"Features: {'random' if not course.updates else 'known' if found else f'{event.seconds:.0f} s'}{about and f'; {about}'}.")


def _learnt(session: Session, learner: FeatureStep, course: Course, micro_batch: int, signals: Signals) -> tuple[float, int]:
    """Goes the whole course; the mean loss at its end (NaN if it has no update), and the largest micro-batch that fitted."""
    loader, device, began = session.loader, session.device, time.monotonic()
    losses: list[Tensor] = []
    with learner.learning():
        for update in range(course.updates):
            if signals.received is not None:
                raise Stopped(signals.received, 0)
            data = loader.pieces(course.first(update), course.batch)

            def compute(count: int, data: Any = data, update: int = update) -> Tensor:
                learner.optimizer.zero_grad(set_to_none=True)  # of a part that had been computed when memory ran out
                return learner.gradients(data, course, update, count)

            loss, micro_batch = _fitted(device, compute, micro_batch)
            losses.append(loss)
            learner.update(update / course.updates)
            if device.type == "xla":  # else all updates would become one program
                limit.wait(device)
            losses = losses[-LAST:]
            session.console.features(update + 1, course.updates, time.monotonic() - began)
    mean = sum(map(float, losses)) / len(losses) if losses else math.nan
    if losses and not math.isfinite(mean):
        raise UserError("the features of D cannot be learnt, their loss is not finite: lower --feature-rate.")
    return mean, micro_batch


def _fitted(device: torch.device, work: Callable[[int], T], micro_batch: int) -> tuple[T, int]:
    """What ``work`` gives in micro-batches of at most ``micro_batch``, or of half as many until memory suffices; and how many."""
    while True:
        try:
            return work(micro_batch), micro_batch
        except limit.SHORTAGE as error:
            if micro_batch == 1 or not limit.is_out_of_memory(error):
                raise
        # Outside the except block: while the error is alive, so are the tensors of the frames it went through.
        limit.release(device)
        micro_batch = -(-micro_batch // 2)


def _fitting(session: Session, held: int, most: int) -> int:
    """The largest micro-batch, at most ``most``, that takes no more than ``held`` bytes, as far as that is known."""
    traces = Traces(session.recipe, session.device)
    if traces.knows_features():
        growth = traces.features()
        while most > 1 and growth.peaks([most], several=True)[0] > held:
            most = -(-most // 2)
    return most


def _file(session: Session, learner: FeatureStep, course: Course, micro_batch: int) -> Any:
    """Where features are kept that are bitwise those that would be learnt now."""
    memory, data = session.recipe.memory, session.recipe.data
    labels = session.loader.labels(0, course.held_out + course.learnt) if "labels" in learner.tasks else None
    # Levels say where heads are, not what is learnt, and the course says in how many updates.
    others = ("feature_levels", "feature_updates")
    options = {k: v for k, v in asdict(learner.options).items() if k.startswith("feature") and k not in others}
    about = [
        VERSION, options, data.shape, data.flip, session.recipe.training.seed, session.loader.fingerprint, asdict(course),
        micro_batch,
        hashlib.sha256(labels.numpy().tobytes()).hexdigest() if labels is not None else None, learner.tasks,
        session.machine(), memory.precision, memory.channels_last, memory.in_place,
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "encoders" / f"{name}.safetensors"


def _known(learner: FeatureStep, file: Any) -> dict[str, Any] | None:
    """Takes the features in ``file``, if they are there; what was told of them."""
    try:
        tensors, told = checkpoint.load(cached(file))
        learner.encoder.load_state_dict(tensors)
        return {"loss": told["loss"] if told["loss"] is not None else math.nan, "accuracy": told["accuracy"]}
    except (UserError, RuntimeError, KeyError):  # not there yet, or damaged
        return None


def _keep(learner: FeatureStep, file: Any, told: dict[str, Any]) -> None:
    try:
        loss = told["loss"] if math.isfinite(told["loss"]) else None
        checkpoint.save(file, learner.encoder.state_dict(), told | {"loss": loss})
    except UserError:
        pass  # the next run learns them again
