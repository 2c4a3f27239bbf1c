"""Checkpoints: whole, verified, pruned."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugan.utils import checkpoint
from frugan.utils.errors import UserError

STATE = {"images": 12, "rates": [1e-4, 0.1 + 0.2]}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weights": torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last),
        "count": torch.tensor(3),
        "half": torch.randn(7).bfloat16(),
        "none": torch.empty(0, 2),
    }


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.path_for(tmp_path, 12)
    checkpoint.save(path, tensors(), STATE)
    loaded, state = checkpoint.load(path)
    assert state == STATE
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors().items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cut_and_any_changed_byte_is_noticed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("c") / "images_1.safetensors"
    checkpoint.save(path, tensors(), STATE)
    good = path.read_bytes()
    if data.draw(st.booleans(), label="cut"):
        path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    else:
        at = data.draw(st.integers(0, len(good) - 1))
        path.write_bytes(good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :])
    try:
        loaded, state = checkpoint.load(path)
    except UserError as error:
        assert str(path) in str(error)
    else:  # a byte that means nothing, such as a space in the header
        assert state == STATE
        assert all(torch.equal(loaded[k], v) for k, v in tensors().items())


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for images in (5, 100, 20):
        checkpoint.save(checkpoint.path_for(tmp_path, images), {"a": torch.zeros(1)}, {})
    checkpoint.prune(tmp_path, 2)
    assert [checkpoint.load(p)[1] for p in checkpoint.all_in(tmp_path)] == [{}, {}]
    assert checkpoint.all_in(tmp_path)[-1] == checkpoint.path_for(tmp_path, 100)
    assert checkpoint.path_for(tmp_path, 5) not in checkpoint.all_in(tmp_path)


def test_a_disk_that_is_full_is_one_sentence_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = checkpoint.path_for(tmp_path, 1)
    checkpoint.save(path, tensors(), STATE)
    before = path.read_bytes()
    script = f"""
import resource, signal, torch
from pathlib import Path
from frugan.utils import checkpoint
from frugan.utils.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    checkpoint.save(Path({str(path)!r}), {{"large": torch.zeros(100_000)}}, {{}})
except UserError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert f"cannot write {path}" in said
    assert "what was there before is untouched" in said
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
