"""The memory engine without the rest of frugan: its folder and `utils`, copied, train models that we did not write."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import frugan

from .conftest import write_idx

SOURCES = Path(frugan.__file__).parent
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(("example", "measure"), [("vae.py", "([\\d.]+) nats"), ("classifier.py", "cross entropy ([\\d.]+)")])
def test_it_trains_a_foreign_model_within_a_budget(example: str, measure: str, tmp_path: Path) -> None:
    package = tmp_path / "frugan"
    for room in ("memory", "utils"):
        shutil.copytree(SOURCES / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text("")
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 256)
    write_idx(tmp_path / "data", labels[:, None, None] * 24 + random.integers(0, 30, (256, 28, 28)), labels)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        checked = "import sys, runpy, frugan; assert frugan.__path__ == [sys.argv[1]]; sys.argv = sys.argv[2:]"
        command = [sys.executable, "-c", f"{checked}; runpy.run_path(sys.argv[0], run_name='__main__')", str(package)]
        command += [str(EXAMPLES / example), str(tmp_path / "data"), "--batch", "128", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})

    refused = run("--memory", "10MiB")
    smallest = re.search(r"the smallest that works is (\d+)MiB", refused.stderr)
    assert refused.returncode and smallest, refused.stderr
    assert refused.stderr.startswith(f"{example}: ") and refused.stderr.count("\n") == 1
    done = run("--memory", f"{smallest[1]}MiB", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    measured = [float(found) for found in re.findall(measure, done.stdout)]
    assert len(measured) == 3 and measured[-1] < measured[0]
    held = re.findall(r"at most (\d+) MiB", done.stdout)
    assert held and int(held[-1]) <= int(smallest[1])


@pytest.mark.parametrize("example", ["vae.py", "classifier.py"])
def test_an_example_without_its_images_says_so_in_a_sentence(example: str, tmp_path: Path) -> None:
    for folder in (tmp_path / "nothere", tmp_path):  # which is not there, and which has no images
        done = subprocess.run([sys.executable, str(EXAMPLES / example), str(folder)], capture_output=True, text=True)
        assert done.returncode == 1 and not done.stdout
        assert re.fullmatch(rf"{example}: there is no train-images-idx3-ubyte in {folder}: name a folder of .*\.\n", done.stderr)


def test_it_knows_nothing_of_gans_flags_or_folders() -> None:
    text = "\n".join(path.read_text() for path in (SOURCES / "memory").glob("*.py"))
    assert not re.findall(r"discriminator|the generator\b|latent|--[a-z]{2,}|runs/", text)
