"""Files that are either written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from frugan.errors import UserError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a name to write to, which becomes ``path`` when the block ends well; until then ``path`` stays as it was.

    Raises:
        UserError: the file cannot be written (a full disk, no permission).
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.chmod(0o666 & ~_umask())  # safetensors lets nobody else read what it writes
        with part.open("rb") as file:
            os.fsync(file.fileno())
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


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def cache_folder() -> Path:
    """Where downloads lie: ``$FRUGAN_CACHE``, or ``~/.cache/frugan``."""
    return Path(os.environ.get("FRUGAN_CACHE") or Path.home() / ".cache" / "frugan")
