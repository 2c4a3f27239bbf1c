"""What the tests share: tiny data of every kind, and small real trainings on it."""

import atexit
import gc
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does: two test processes share the cores

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

import frugan
from frugan.config import recipes
from frugan.data.sources.standard import as_published
from frugan.reporting.run_folder import RunFolder
from frugan.utils import checkpoint

torch.set_num_threads(1)  # two test processes share the cores, and what is small is sooner done by one thread
if "PYTEST_XDIST_WORKER" not in os.environ:  # the first process: all that it starts have its cache, of packs and classifiers
    os.environ["FRUGAN_CACHE"] = tempfile.mkdtemp(prefix="frugan-")
    atexit.register(shutil.rmtree, os.environ["FRUGAN_CACHE"], ignore_errors=True)
settings.register_profile("patient", deadline=None)  # shared machines stall now and then
settings.load_profile("patient")


@pytest.fixture(autouse=True, scope="module")
def _collected() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(autouse=True)
def _frozen(_collected: None) -> None:
    """What is there now is not looked at again by every training, plan and picture, which took a fifth of the tests' time."""
    gc.freeze()


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray | None = None, part: str = "train") -> Path:
    """Writes arrays of bytes as the IDX files of one part of a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        if array is not None:
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return folder


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 digits of 8x8 pixels as IDX files: four updates of 16 make an epoch."""
    images, labels = as_published()
    return write_idx(tmp_path_factory.mktemp("data") / "few", np.rint(images[:64] * 15.9375), labels[:64])


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of ``n`` colour images of different shapes, one folder a class if there are ``classes``."""

    def make(name: str = "photos", n: int = 20, classes: int = 0, side: int = 40) -> Path:
        random = np.random.default_rng(0)
        root = tmp_path / name
        for i in range(n):
            folder = root / f"class{i % classes}" if classes else root
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (side + i % 5, side + i % 3, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03}.png")
        return root

    return make


OWN_CODE = [name for name in recipes.RECIPES if name != "resize"]  # recipes that no other trains by the same code as

SMALL = {
    "recipe": "dcgan",
    "batch_size": 16, "epochs": 3, "image_size": 8, "latent_dim": 8, "width_g": 8, "width_d": 8,
    "sample_every": 100, "report_every": 3, "quiet": True, "device": "cpu", "threads": 1, "precision": "fp32",
}  # fmt: skip


@pytest.fixture
def train(few: Path) -> Callable[..., Path]:
    """A training of a second; settings as `frugan.train` takes them."""

    def run(out: Path, data: Path | str = few, **own: object) -> Path:
        return frugan.train(data, out=out, **(SMALL | own))

    return run


def final_state(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Everything in the newest checkpoint of a run: weights, moments, averages, counters."""
    newest = RunFolder(run).newest_checkpoint()
    assert newest is not None
    return checkpoint.load(newest)


def assert_same_state(run: Path, other: Path) -> None:
    """Bitwise the same training state."""
    (tensors, numbers), (others, other_numbers) = final_state(run), final_state(other)
    assert tensors.keys() == others.keys()
    differing = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not differing
    for name in ("images", "updates", "scaler", "plateau", "rates", "epoch_mean"):
        assert numbers[name] == other_numbers[name], name
    assert numbers.get("augment") == other_numbers.get("augment")


def snapshot(folder: Path) -> dict[str, bytes]:
    """The contents of every file below ``folder``, locks aside."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}
