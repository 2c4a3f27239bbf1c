"""``frugan data``: packs images, or tells what is there."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugan.cli.parsing import Command, data_options, data_said, extra
from frugan.config import recipe
from frugan.utils.errors import UserError, counted


@dataclass
class Data:
    """Packs images, or tells what is there: see frugan data --help."""


class Pack:
    """Decodes, crops and resizes images once, into a pack that trainings read: beforehand, instead of on first use."""


class Check:
    """Tells what is there, before one trains on it; writes a sheet of images to look at."""


def _images(options: Any, tell: Callable[[str], None]) -> tuple[Any, recipe.Data]:
    """The source that was named, and the data section with everything filled in."""
    from frugan.data.opening import opened

    source, data = opened(recipe.Data(**data_said(options)), tell)
    if not source.random_access:
        source.open(0, 0)
    return source, data


def pack(options: Any) -> None:
    """Packs images beforehand."""
    from frugan.data.packing import make, packed
    from frugan.reporting.console import Console

    console = Console()
    source, data = _images(options, console.tell)
    ways: dict[str, Any] = {"workers": options.workers, "tell": console.tell, "progress": console.packing}
    if options.out is None:
        made = packed(source, data, **ways)
    else:
        out = Path(options.out)
        if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} holds something else: name a new folder.")
        for problem in source.problems:
            console.tell(problem)
        made = make(source, data, out, **ways)
    known = made.manifest
    skipped = f", {known.skipped} skipped" if known.skipped else ""
    shape = f"{known.size}x{known.size}, {counted(known.channels, 'channel')}"
    print(f"{made.folder}: {counted(known.images, 'image')} of {shape}{skipped}")


def check(options: Any) -> None:
    """Tells what is there, before one trains on it."""
    from frugan.data.inspection import check as look
    from frugan.data.packing import none_of
    from frugan.reporting import pictures
    from frugan.reporting.console import Console

    console = Console(quiet=options.json)
    source, data = _images(options, console.tell)
    if source.pack is not None:
        source.pack.check()
    found = look(source, data, workers=options.workers, progress=console.looking)
    sheet = Path(options.sheet or f"{source.name}-check.png")
    if found.shown:
        import numpy as np
        import torch

        pictures.save(pictures.grid(torch.from_numpy(np.stack(found.shown))), sheet)
    if options.json:
        print(json.dumps(found.as_dict() | {"problems": list(source.problems), "sheet": str(sheet)}))
    else:
        console.found(found, source.problems, data)
        console.tell(f"Images as training sees them are in {sheet}.")
    if not found.images:
        raise UserError(f"{none_of(source)} can be read.")


COMMANDS = {
    "pack": Command(
        lambda _: data_options(Pack, extra("out", str | None, "folder to write; unset: the cache, where trainings find it")), pack
    ),
    "check": Command(
        lambda _: data_options(
            Check,
            extra("sheet", str | None, "picture to write; unset: NAME-check.png"),
            extra("json", bool, "print what was found as JSON", False),
        ),
        check,
    ),
}
