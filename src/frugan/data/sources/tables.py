"""Tables of images (parquet, Arrow, the hub) by Hugging Face datasets."""

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from frugan.config.recipe import Data
from frugan.data.sources.base import Source, by_name, is_image, loaded, shown, stamp_of
from frugan.utils.errors import UserError, nearest_path

PATIENCE = 10  # seconds in which the hub has to answer
TABLES = {".parquet": "parquet", ".arrow": "arrow"}


def file_in(cell: dict[str, Any] | None, folders: Sequence[Path]) -> bytes:
    """The image file in a cell of a table, or the one that it names within ``folders``; relative names begin at the first.

    A table that somebody else made must not reach for other files, nor for the network.

    Raises:
        OSError, ValueError: there is none, or it lies elsewhere.
    """
    content, name = (cell or {}).get("bytes"), (cell or {}).get("path")
    if content is not None:
        return bytes(content)
    if not name:
        raise ValueError("there is no image in it")
    if "://" in name or not folders:
        raise ValueError(f"it names {shown(name)} instead of holding an image")
    file: Path = (folders[0] / name).resolve()
    if not any(file.is_relative_to(folder.resolve()) for folder in folders):
        raise ValueError(f"it names {shown(name)}, outside the folder of the table: move the table above its images")
    if not file.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"it names {shown(name)}, where there is no file")
    return file.read_bytes()


def label_column(features: Mapping[str, Any], name: str, data: Data) -> str | None:
    """Which column of the table ``name`` has the labels: the one that is asked for, else the first of classes, or ``label``.

    Raises:
        UserError: the one that is asked for is not there.
    """
    kinds = [column for column, kind in features.items() if hasattr(kind, "names")]  # of datasets.ClassLabel
    label = data.label_column or next(iter(kinds), None) or ("label" if "label" in features else None)
    if label is not None and label not in features:
        raise UserError(f"{name} has no column {label}: name one of {', '.join(features)} with --label-column.")
    return label


class RecordSource(Source):
    """The images of a table that Hugging Face datasets has opened; files that it names are read if they lie in ``folders``.

    Raises:
        UserError: there is no such column.
    """

    def __init__(self, name: str, place: str, stamp: str, table: Any, data: Data, folders: Sequence[Path]) -> None:
        import datasets

        self.folders = folders
        self.name, self.place, self.stamp = name, place, stamp
        features = table.features
        images = [c for c, kind in features.items() if isinstance(kind, datasets.Image)]
        column = (
            data.image_column
            or next(iter(images), None)
            or next((c for c in ("image", "img", "jpg", "png") if c in features), None)
        )
        if column not in features:
            raise UserError(
                f"{name} has no column of images {column or ''}: name one of {', '.join(features)} with --image-column."
            )
        self.column = column
        self.table = table.cast_column(column, datasets.Image(decode=False)).select_columns([column])
        if (label := label_column(features, name, data)) is not None:
            values = table.select_columns([label])[:][label]
            names = getattr(features[label], "names", ())
            where = lambda i: f"row {i} of {name} has none, as {values.count(None):,} of {len(values):,} rows"  # noqa: E731
            if names and None not in values:
                self.classes, self.labels = names, np.asarray(values, np.int64)
            else:
                self.classes, self.labels, self.unlabelled = by_name([v if v is None else str(v) for v in values], where)

    def __len__(self) -> int:
        return len(self.table)

    def where(self, index: int) -> str:
        """Its row, with its file name if it has one."""
        path = (self.table[index][self.column] or {}).get("path")
        return f"row {index} of {self.name}" + (f" ({shown(PurePosixPath(path).name)})" if path else "")

    def open(self, index: int, at_least: int) -> Image.Image:
        """Image ``index`` with its pixels read."""
        return loaded(BytesIO(file_in(self.table[index][self.column], self.folders)), at_least)


def _of_hub(name: str, split: str | None) -> Any:
    """The data set ``name`` on the hub, which is asked once whether it has it, since datasets asks six times in 25 seconds.

    Where the hub does not answer, what datasets keeps of it is taken.

    Raises:
        Exception: it is neither here nor there.
    """
    import datasets
    from huggingface_hub import HfApi, constants

    away: Exception | None = None
    try:
        HfApi().dataset_info(name, timeout=PATIENCE)
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403, 404):
            raise OSError("the hub has none of that name that anybody may read") from None
        away = error
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if away:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return datasets.load_dataset(name, split=split)
    except Exception as error:
        raise away or error from None
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def records(data: Data) -> Source | None:
    """Parquet or Arrow files, or a folder of them, or the name of a data set on the hub (``owner/name``)."""
    path = Path(data.data)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in TABLES)
        if not files or any(is_image(p.name) for p in path.iterdir()):
            return None
        if len(kinds := {p.suffix for p in files}) > 1:
            raise UserError(f"{path} holds {' and '.join(sorted(kinds))} files: keep one kind.")
    elif path.is_file() and path.suffix in TABLES:
        files = [path]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", data.data) and not path.exists() and not path.parent.exists():
        files = []
    else:
        return None
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError:
        raise UserError(f"{data.data} needs Hugging Face datasets: pip install frugan[datasets].") from None
    datasets.disable_progress_bars()
    split = None if data.split == "all" else data.split
    try:
        if files:
            chosen = [p for p in files if split and split in p.stem] or files  # train-00000-of-00002.parquet
            table = datasets.load_dataset(TABLES[files[0].suffix], data_files=[str(p) for p in chosen], split="train")
            stamp = stamp_of((str(p), (about := p.stat()).st_size, about.st_mtime_ns) for p in chosen)
            folders = [path if path.is_dir() else path.parent]
        else:
            table = _of_hub(data.data, split)
            table = datasets.concatenate_datasets(list(table.values())) if split is None else table
            stamp = table._fingerprint
            config = datasets.config  # where what the hub has as files lies once it is here
            folders = [Path(p) for p in (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)]
    except MemoryError:
        raise
    except Exception as error:  # of datasets, fsspec, pyarrow and the network
        reason = " ".join(str(error).split())[:200].rstrip(".")
        if files:
            raise UserError(f"cannot read {data.data} ({reason}): fetch it again.") from None
        near = nearest_path(path)
        way = f"did you mean {str(near)!r}, or " if near else ""
        raise UserError(
            f"there is no folder {data.data}, and as a data set on the hub it cannot be had ({reason}): {way}"
            "check the name and --split, or download its parquet files and name their folder."
        ) from None
    name = path.name if path.is_dir() else path.stem if files else data.data.split("/")[1]
    return RecordSource(name, str(path.absolute()) if files else data.data, stamp, table, data, folders)
