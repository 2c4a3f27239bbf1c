"""``make gpu``: its script runs on the simulated device, says what failed, and refuses where there is no GPU."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from . import sim

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
PAGE = SCRIPT.parent.parent / "docs" / "gpu.md"
needs_sim = pytest.mark.skipif(sim.missing() is not None, reason=str(sim.missing()))
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def sections(page: str) -> dict[str, str]:
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in page.split("\n## ")[1:]}


@needs_sim
def test_the_page_has_numbers_for_what_was_asked_for_and_says_what_was_not(tmp_path: Path, gpu: ModuleType) -> None:
    out, numbers, before = tmp_path / "page.md", tmp_path / "numbers.json", PAGE.read_bytes()
    asked = ("prediction", "precision", "offloading")
    done = run("--device", "sim", "--quick", "--only", *asked, "--out", str(out), "--json", str(numbers))
    assert done.returncode == 0, done.stderr
    found = sections(out.read_text())
    assert [*found] == [section.title for section in gpu.SECTIONS.values()]
    for name, section in gpu.SECTIONS.items():
        rows = [line for line in found[section.title].splitlines() if line.startswith("| ")][2:]
        if name in (*asked, "hardware"):
            assert rows and any(character.isdigit() for character in "".join(rows)), name
        else:
            assert not rows and "Not asked for" in found[section.title], name
    assert "not a GPU" in out.read_text()
    assert "tf32 is of NVIDIA GPUs" in found["Precisions"]  # a cell that fails is a row, and the next is measured
    measured = json.loads(numbers.read_text())
    for what in ("allocated", "reserved", "process"):
        predicted, there = measured["prediction"][0]["found"][what]
        assert there and abs(predicted - there) < 0.1 * there + gpu.MIB * 2, what  # a small segment more or less
    assert all(way["same"] for way in measured["offloading"][0]["found"].values())
    assert PAGE.read_bytes() == before


@needs_sim
def test_what_time_does_not_suffice_for_is_said_and_the_page_is_not_written_unasked(gpu: ModuleType) -> None:
    before = PAGE.read_bytes()
    done = run("--device", "sim", "--quick", "--minutes", "0.01")
    assert done.returncode == 0, done.stderr
    found = sections(done.stdout)
    assert len(found) == len(gpu.SECTIONS)
    assert all("Not reached" in text or "Not on the simulated" in text for text in found.values())
    assert PAGE.read_bytes() == before


def test_a_process_that_crashes_or_takes_too_long_is_a_row_and_its_children_end(tmp_path: Path, gpu: ModuleType) -> None:
    assert gpu.ended([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], 20)[2] == "ended by signal 11"
    assert gpu.ended([sys.executable, "-c", "import sys; sys.exit('the sentence')"], 20)[2] == "the sentence"
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; print('RESULT', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    out, _, why = gpu.ended([sys.executable, "-c", parent], 2)
    assert (out, why) == ("RESULT\n", "ended after 2 s")  # what it had found is kept
    time.sleep(max(0.0, begin + 5 - time.monotonic()))
    assert not mark.exists()

    cell = {"measure": "speed", "recipe": "r3", "side": 28, "batch": 128}
    partly = {"tutorial": {"begun in": 1.0, "rates": [100.0, 120.0, 110.0]}, "failed": "ended by signal 11"}
    shown = gpu.shown(gpu.SECTIONS["speed"], [(cell, {"failed": "out of luck"}), (cell, partly)])
    rows = shown.splitlines()[2:]
    assert len(rows) == 3 and "out of luck" in rows[0] and "| 110 |" in rows[1] and "signal 11" in rows[2]
    assert {row.count("|") for row in shown.splitlines()} == {len(gpu.SECTIONS["speed"].columns) + 1}


@without_gpu
def test_without_a_gpu_it_refuses_in_one_sentence() -> None:
    done = run()
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and torch.__version__ in done.stderr and "Traceback" not in done.stderr
    assert run("--only", "nothing").returncode == 2


def test_the_committed_page_says_whether_it_was_run() -> None:
    text = PAGE.read_text()
    assert ("has been run on a GPU" in text) != ("Written by `make gpu`" in text)
    assert "not a GPU" not in text  # nobody has put the simulated device's numbers there
