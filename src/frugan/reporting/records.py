"""What a training writes down as it goes: a `Line` at every report, and an `Event` for what happens between two of them.

A record is a line of ``log.jsonl``: `as_dict` is what stands there, and `parse` reads it back.

Add a kind of event by writing its dataclass here and putting it into `EVENTS`.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


def number(value: object) -> float | None:
    """``value`` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e300 else None  # not NaN either


@dataclass(frozen=True, kw_only=True)
class Line:
    """One report. What an odd log leaves out has the default, NaN where that is not known.

    Attributes:
        images: seen so far.
        epoch: the same, in epochs.
        updates: of D so far.
        speed: images a second, on average since training began or went on, without the time of what ``looking`` is the share of.
        looking: share of the time until then that pictures, checkpoints and evaluation took.
        seconds_left: to the end of training.
        memory: bytes that the process holds; 0 if that was not measured.
        measured: the means since the line before by their names, as ``Loss_D``, ``D(x)``, ``R1``.
        lr_g: learning rate of G.
        lr_d: learning rate of D.
    """

    images: int
    epoch: float = 0.0
    updates: int = 0
    speed: float = math.nan
    looking: float = math.nan
    seconds_left: float = math.nan
    memory: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)
    lr_g: float = math.nan
    lr_d: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        """As ``log.jsonl`` has it."""
        return {
            "images": self.images, "epoch": self.epoch, "updates": self.updates, "images/s": self.speed,
            "looking": self.looking, "seconds left": self.seconds_left, "memory": self.memory,
            **self.measured, "lr_g": self.lr_g, "lr_d": self.lr_d,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What ``found`` in ``log.jsonl`` says; every value that no other attribute has was measured."""
        return cls(
            images=_whole(found, "images"), epoch=_real(found, "epoch", 0.0), updates=_whole(found, "updates"),
            speed=_real(found, "images/s"), looking=_real(found, "looking"), seconds_left=_real(found, "seconds left"),
            memory=_whole(found, "memory"),
            measured=_numbers({name: value for name, value in found.items() if name not in FIXED and value is not None}),
            lr_g=_real(found, "lr_g"), lr_d=_real(found, "lr_d"),
        )  # fmt: skip


FIXED = Line(images=0).as_dict().keys()  # of a line, but for what was measured


@dataclass(frozen=True, kw_only=True)
class Event(ABC):
    """Something that happened between two lines, and ``log.jsonl`` has as it stands here.

    Attributes:
        event: what.
        images: seen before it.
    """

    event: str
    images: int

    def as_dict(self) -> dict[str, Any]:
        """As ``log.jsonl`` has it."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    @abstractmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What ``found`` in ``log.jsonl`` says."""


@dataclass(frozen=True, kw_only=True)
class Metrics(Event):
    """An evaluation.

    Attributes:
        values: of the metrics, by their names.
        samples: how many were looked at.
        protocol: how it was done: only what was done alike is compared.
    """

    event: str = "metrics"
    values: Mapping[str, float]
    samples: int
    protocol: str

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What ``found`` in ``log.jsonl`` says."""
        values = found.get("values")
        protocol = str(found.get("protocol") or f"{found.get('samples', 'some')} samples")
        known = _numbers(values) if isinstance(values, Mapping) else {}
        return cls(images=_whole(found, "images"), values=known, samples=_whole(found, "samples"), protocol=protocol)


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """A sign that the training goes wrong (`frugan.training.diagnostics`).

    Attributes:
        kind: of sign.
        text: what is wrong and what to try, for people.
    """

    event: str = "warning"
    kind: str
    text: str

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What ``found`` in ``log.jsonl`` says."""
        return cls(images=_whole(found, "images"), kind=str(found.get("kind", "warning")), text=str(found.get("text", "")))


@dataclass(frozen=True, kw_only=True)
class LayoutChanged(Event):
    """A phase goes on in another way; the event is why (`frugan.memory.recover.Cause`).

    Attributes:
        phase: D or G.
        change: the new way, in words.
        guarantee: what it leaves as it was (`frugan.memory.layout.Guarantee`).
    """

    phase: str
    change: str
    guarantee: str

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What ``found`` in ``log.jsonl`` says."""
        phase, change, guarantee = (str(found.get(key, "?")) for key in ("phase", "change", "guarantee"))
        return cls(event=str(found["event"]), images=_whole(found, "images"), phase=phase, change=change, guarantee=guarantee)


@dataclass(frozen=True, kw_only=True)
class MemoryMeasured(Event):
    """At the end, how much memory it took.

    Attributes:
        predicted: bytes at most, by the plan.
        measured: bytes at most.
        budget: bytes there were, if it was named.
        host_predicted: bytes at most on the host, where training is on another device; 0 where it is not.
        host: the same as it was measured.
    """

    event: str = "memory"
    predicted: int
    measured: int
    budget: int | None
    host_predicted: int = 0
    host: int = 0

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What ``found`` in ``log.jsonl`` says."""
        images, predicted, measured = (_whole(found, key) for key in ("images", "predicted", "measured"))
        host_predicted, host = (_whole(found, key) if key in found else 0 for key in ("host_predicted", "host"))
        return cls(
            images=images, predicted=predicted, measured=measured, budget=_whole(found, "budget") or None,
            host_predicted=host_predicted, host=host,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DurationDecided(Event):
    """How many images the minutes that were asked for are.

    Attributes:
        total: images of the whole training.
        seconds: that had passed.
    """

    event: str = "duration"
    total: int
    seconds: float

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What ``found`` in ``log.jsonl`` says."""
        return cls(images=_whole(found, "images"), total=_whole(found, "total"), seconds=_real(found, "seconds"))


@dataclass(frozen=True, kw_only=True)
class FeaturesLearnt(Event):
    """Before the first update, the features that D is built on were learnt.

    Attributes:
        task: what from.
        updates: of them; 0 if they stay random.
        loss: mean of the last updates; NaN if there were none.
        accuracy: shares of images that were not learnt from about which they are right, by task.
        seconds: that it took.
        found: whether they were learnt before, and taken from the cache.
    """

    event: str = "features"
    task: str
    updates: int
    loss: float
    accuracy: Mapping[str, float]
    seconds: float
    found: bool

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What ``found`` in ``log.jsonl`` says."""
        accuracy = found.get("accuracy")
        return cls(
            images=_whole(found, "images"), task=str(found.get("task", "?")), updates=_whole(found, "updates"),
            loss=_real(found, "loss"), accuracy=_numbers(accuracy) if isinstance(accuracy, Mapping) else {},
            seconds=_real(found, "seconds"), found=bool(found.get("found")),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Unknown(Event):
    """An event that this version does not know.

    Attributes:
        rest: what else was said of it.
    """

    rest: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """As ``log.jsonl`` has it."""
        return {"event": self.event, "images": self.images, **self.rest}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What ``found`` in ``log.jsonl`` says."""
        rest = {name: value for name, value in found.items() if name not in ("event", "images")}
        return cls(event=str(found["event"]), images=_whole(found, "images"), rest=rest)


EVENTS: dict[str, type[Event]] = {
    "metrics": Metrics,
    "warning": Warned,
    "memory ran out": LayoutChanged,
    "the budget was exceeded": LayoutChanged,
    "memory suffices again": LayoutChanged,
    "memory": MemoryMeasured,
    "duration": DurationDecided,
    "features": FeaturesLearnt,
}
Record = Line | Event


def parse(text: str) -> Record | None:
    """What a line of ``log.jsonl`` says; None if it is none, or was cut short by a kill."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or number(found.get("images")) is None:
        return None
    if "event" not in found:
        return Line.from_dict(found)
    return EVENTS.get(str(found["event"]), Unknown).from_dict(found)


def _whole(found: Mapping[str, Any], key: str) -> int:
    value = found.get(key)
    return 0 if value is None or number(value) is None else int(value)


def _real(found: Mapping[str, Any], key: str, otherwise: float = math.nan) -> float:
    value = number(found.get(key))
    return otherwise if value is None else value


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: _real(found, name) for name in found}
