"""From what was asked for to images: a source, what is not said about it filled in, and a loader."""

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from frugan.config.recipe import Data
from frugan.data.classes import classes_of as classes_of
from frugan.data.classes import classes_read as classes_read
from frugan.data.classes import present as present
from frugan.data.decode import background_colour, flatten, is_grey
from frugan.data.loader import Loader as Loader
from frugan.data.pack_loader import SMALL, PackLoader
from frugan.data.sources import Source as Source
from frugan.data.sources import Tell as Tell
from frugan.data.sources import open_source
from frugan.data.sources.streams import ShardSource
from frugan.data.stream_loader import StreamLoader, block_of
from frugan.memory import limit
from frugan.utils.errors import UserError, counted

DEFAULT_SIZE = 64  # pixels, where images have no size in common
PACKING = 160 << 20  # bytes that decoding and packing images may take: below that a budget is not held while it goes on
LOOKED_AT = 256  # images that decide whether a folder is grey


def opened(data: Data, tell: Tell) -> tuple[Source, Data]:
    """The images that ``data`` names, and ``data`` with image size and channels filled in from them.

    Raises:
        UserError: they are not there, or cannot be read.
    """
    background_colour(data.background)  # refuses what is none, whether it is needed or not
    source = open_source(data)
    for sentence in source.ignored(data):
        tell(sentence)
    return source, resolve(source, data, tell)


def resolve(source: Source, data: Data, tell: Tell) -> Data:
    """``data`` with image size and channels filled in from the images themselves."""
    size = data.image_size or source.size or DEFAULT_SIZE
    channels = data.channels
    if channels is None and source.grey is not None:
        channels = 1 if source.grey else 3
    if channels is None:
        background = background_colour(data.background)
        chosen = np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int)
        grey = 0
        for looks in (_looks_grey(source, int(i), background) for i in chosen):
            if looks is False:  # one that has colour decides
                channels = 3
                break
            grey += looks is True
        else:
            channels = 1
            if grey:
                tell(f"None of the images looked at ({grey}) has colour: training in grey; --channels 3 trains in colour.")
    return Data(**(vars(data) | {"image_size": max(size, 8), "channels": channels}))


def _looks_grey(source: Source, index: int, background: tuple[int, int, int]) -> bool | None:
    try:
        with source.open(index, DEFAULT_SIZE) as image:
            return is_grey(flatten(image, background))
    except Exception:  # packing names the file
        return None


def open_loader(
    source: Source, data: Data, *, seed: int, workers: int, tell: Tell, batch: int = 1, share: tuple[int, int] = (0, 1),
    **keeping: Any,
) -> Loader:  # fmt: skip
    """What gives the images of ``source`` as ``data`` (resolved) wants them; ``batch`` and ``share``: see `StreamLoader`,
    ``keeping``: see `PackLoader`."""
    if not isinstance(source, ShardSource):
        return PackLoader(source, data, seed=seed, workers=workers, tell=tell, **keeping)
    for problem in source.problems:
        tell(problem)
    return StreamLoader(source.shards, data, seed=seed, workers=workers, tell=tell, batch=batch, share=share)


def open_within(memory: str | None, source: Source, data: Data, batch: int, device: torch.device, **options: Any) -> Loader:
    """The same for trainings in batches of ``batch`` on ``device``; packing is held to the budget ``memory``, as said, on the CPU,
    if that leaves room for it.

    Raises:
        UserError: memory ran out; or there are fewer images than in a batch.
    """
    budget = limit.budget(memory, device)
    room = source.random_access and device.type == "cpu" and budget is not None and budget - limit.held(device) > PACKING
    try:
        with limit.limited(budget, device) if budget is not None and room else nullcontext():
            loader = open_loader(source, data, batch=batch, keep=keepable(budget, device), device=device, **options)
    except limit.SHORTAGE as error:
        if isinstance(error, UserError) or not limit.is_out_of_memory(error):
            raise
    else:
        if batch > len(loader):
            raise UserError(
                f"--batch-size {batch} is more than the {counted(len(loader), 'image')} of {source.name}: "
                f"use --batch-size {min(64, len(loader))}{' or fewer' if len(loader) > 1 else ''}."
            )
        return loader
    within = f" within --memory {memory}" if room else ""
    raise UserError(
        f"memory ran out while packing {source.name}{within}: use fewer --workers, or pack it first with frugan data pack."
    )


def bytes_of(source: Source, data: Data, batch: int, keep: int = SMALL) -> int:
    """Bytes that a loader of ``source`` holds while batches of ``batch`` are trained on."""
    if isinstance(source, ShardSource):
        return (2 * min(block_of(data), len(source)) + batch) * math.prod(data.shape)
    whole = len(source) * math.prod(data.shape)
    return whole if whole <= keep else 0


def keepable(budget: int | None, device: torch.device) -> int:
    """Bytes of images worth keeping on ``device``: at most a quarter of what a budget leaves there, or of what is free."""
    there = limit.spare(device) if budget is None else budget - limit.held(device)
    return max(0, min(SMALL, there // 4) if device.type in ("cpu", "mps") else there // 4)
