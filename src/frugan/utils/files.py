"""Files that are either written whole or not at all."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from secrets import token_hex

from frugan.utils.errors import UserError

STALE = 24 * 3600  # seconds without a write after which a part is one that a kill left
CACHED = 100  # files of a kind, of up to 20 MB each, that stay in the cache
PARTS = ".*." + "[0-9a-f]" * 8 + ".part*"  # what `whole` calls them


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a name to write to, which becomes ``path`` when the block ends well; until then ``path`` stays as it was.

    The name is nobody else's, so that processes which write the same file do not write into one another's; the last one stays.

    Raises:
        UserError: the file cannot be written (a full disk, no permission).
    """
    part = path.with_name(f".{path.stem}.{token_hex(4)}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent.absolute())
        yield part
        with part.open("r+b") as file:  # Windows syncs only what may be written to
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())  # safetensors lets nobody else read what it writes
        part.replace(path)
        if os.name == "posix":  # the new name must reach the disk too
            parent = os.open(path.parent, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was there before is untouched.") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sweep(folder: Path, pattern: str) -> None:
    """Removes from ``folder`` the parts of files and folders that fit ``pattern`` and nobody has written to for a day."""
    with suppress(OSError):
        for part in list(folder.glob(pattern)):
            with suppress(OSError):
                if time.time() - max(p.stat().st_mtime for p in (part, *part.glob("*"))) > STALE:
                    shutil.rmtree(part) if part.is_dir() else part.unlink()


@cache
def _sweep_once(folder: Path) -> None:
    """Once, since a folder may hold many files, and all of them be written here."""
    sweep(folder, PARTS)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def cached(path: Path) -> Path:
    """``path`` in the cache, used now; of those beside it the `CACHED` last used stay: what can be made anew must not pile up."""
    with suppress(OSError):
        os.utime(path)
    with suppress(OSError):
        alike = [p for p in path.parent.iterdir() if p.suffix == path.suffix and not p.name.startswith(".")]
        for old in sorted(alike, key=lambda p: p.stat().st_mtime, reverse=True)[CACHED:]:
            old.unlink(missing_ok=True)
    return path


def cache_folder() -> Path:
    """Where downloads lie: ``$FRUGAN_CACHE``, or ``~/.cache/frugan``."""
    return Path(os.environ.get("FRUGAN_CACHE") or Path.home() / ".cache" / "frugan")
