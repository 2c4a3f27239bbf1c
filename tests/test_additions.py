"""What CONTRIBUTING.md says of additions: each is made in a copy of the source, in as few files as it says, and trains there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import numpy as np
import pytest

import frugan

SOURCES = Path(frugan.__file__).parent
RUN = """
import sys
from pathlib import Path
import frugan, frugan.cli
assert Path(frugan.__file__).parent == Path(sys.argv[1])
out, few = sys.argv[2:]
SMALL = dict(batch_size=16, epochs=1, image_size=8, latent_dim=4, quiet=True, device="cpu", threads=1)
"""


class Copy:
    """A copy of frugan's source, into which a newcomer writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "frugan"
        copytree(SOURCES, self.folder, ignore=ignore_patterns("__pycache__"))
        self.touched: set[str] = set()

    def write(self, file: str, text: str) -> None:
        """A file of its own."""
        assert not (self.folder / file).exists()
        (self.folder / file).write_text(text)
        self.touched.add(file)

    def append(self, file: str, text: str) -> None:
        """Something at the end of a file."""
        path = self.folder / file
        path.write_text(path.read_text() + text)
        self.touched.add(file)

    def insert(self, file: str, after: str, text: str) -> None:
        """Something behind the first line that has ``after`` in it."""
        path = self.folder / file
        lines = path.read_text().splitlines(keepends=True)
        where = next(i for i, line in enumerate(lines) if after in line)
        path.write_text("".join([*lines[: where + 1], text, *lines[where + 1 :]]))
        self.touched.add(file)

    def run(self, script: str, *arguments: object) -> str:
        """What a script prints that uses the copy."""
        path = os.pathsep.join(filter(None, [str(self.folder.parent), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-c", RUN + script, str(self.folder), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def source(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "copy")


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_loss(source: Copy, tmp_path: Path, few: Path) -> None:
    source.append(
        "config/objectives.py",
        """

@dataclass(frozen=True, kw_only=True)
class LeastSquares(Objective):
    \"\"\"Least squares (Mao et al. 2017).\"\"\"

    kind: ClassVar[str] = "least-squares"
    target: float = option(1.0, "what D should say of real images", above=0)
""",
    )
    source.append(
        "gan/losses.py",
        """

from frugan.config.objectives import LeastSquares

LOSSES[LeastSquares] = Loss(
    lambda options, real, fake: (real - options.target).square() + fake.square(),
    lambda options, fake, real: (fake - options.target).square(),
)
""",
    )
    said = 'frugan.cli.main(["train", few, "--objective", "least-squares", "--target", "0.9", "--r1", "0.1", "--image-size", "8", '
    said += '"--batch-size", "16", "--epochs", "1", "--quiet", "--device", "cpu", "--out", out])'
    source.run(said, tmp_path / "r", few)
    recipe = (tmp_path / "r" / "recipe.toml").read_text()
    assert 'kind = "least-squares"' in recipe and "target = 0.9" in recipe
    assert len(source.touched) <= 2


def test_a_penalty(source: Copy, tmp_path: Path, few: Path) -> None:
    source.insert("config/objectives.py", "r2: float", '    r0: float = option(0.0, "weight of the absolute slope", least=0)\n')
    source.insert(
        "gan/penalties.py", '("r2", "R2"', '    ("r0", "R0", "real", lambda gradient: gradient.flatten(1).abs().sum(1)),\n'
    )
    source.run('frugan.train(few, out=out, recipe="r3", r0=0.3, accumulation_steps=2, **SMALL)', tmp_path / "r", few)
    assert {"R0", "R1", "R2"} <= lines(tmp_path / "r")[0].keys()
    assert '"R0"' in (tmp_path / "r" / "report.html").read_text()
    assert len(source.touched) <= 2


def test_a_network(source: Copy, tmp_path: Path, few: Path) -> None:
    source.append(
        "config/architectures.py",
        """

@dataclass(frozen=True, kw_only=True)
class Tiny(Architecture):
    \"\"\"Dense layers alone.\"\"\"

    kind: ClassVar[str] = "tiny"
    width_g: int = option(8, "units")
    width_d: int = option(8, "units")
""",
    )
    source.write(
        "gan/networks/tiny.py",
        """
from torch import nn
from frugan.gan.networks.blocks import Block, Network

def build(options, image_size, channels):
    pixels = channels * image_size**2
    shape = nn.Unflatten(1, (channels, image_size, image_size))
    generator = Network(Block(nn.Linear(options.latent_dim, pixels), nn.Tanh(), shape))
    return generator, Network(
        Block(nn.Flatten(), nn.Linear(pixels, options.width_d), nn.ReLU()), Block(nn.Linear(options.width_d, 1), nn.Flatten(0))
    )
""",
    )
    script = """
from frugan.config import recipes
run = frugan.train(few, recipe=recipes.dcgan().replace(network="tiny"), out=out, **SMALL)
print(tuple(frugan.load(run).generate(3).shape))
"""
    assert source.run(script, tmp_path / "r", few).strip() == "(3, 1, 8, 8)"
    assert len(source.touched) <= 2


def test_an_augmentation(source: Copy, tmp_path: Path, few: Path) -> None:
    source.append(
        "gan/augment.py",
        """

def negative(images: Tensor, numbers: Tensor, p: float) -> Tensor:
    \"\"\"Light is dark, with chance ``p``.\"\"\"
    return torch.where((numbers[:, 0] < p)[:, None, None, None], -images, images)


OPERATIONS["negative"] = Operation(1, negative)
""",
    )
    source.run(
        "frugan.train(few, recipe='dcgan', out=out, augment='diff', augment_policy='negative,cutout', **SMALL)",
        tmp_path / "run",
        few,
    )
    assert source.touched == {"gan/augment.py"}
    assert all(line["p"] == 1 for line in lines(tmp_path / "run") if "Loss_D" in line)


def test_a_recipe(source: Copy, tmp_path: Path, few: Path) -> None:
    source.append(
        "config/recipes.py",
        """

def lean() -> Recipe:
    \"\"\"Without batch norm in D.\"\"\"
    return Recipe(recipe="lean", network=Dcgan(norm_d="none"), objective=Bce())


RECIPES["lean"] = lean
""",
    )
    source.run('frugan.train(few, recipe="lean", out=out, width_g=4, width_d=4, **SMALL)', tmp_path / "r", few)
    assert 'recipe = "lean"' in (tmp_path / "r" / "recipe.toml").read_text()
    assert len(source.touched) == 1


def test_a_lever(source: Copy, tmp_path: Path, few: Path) -> None:
    source.insert(
        "config/recipe.py",
        "class Memory(Section)",
        """    half_fakes: Choice = lever("fakes one by one", "reassociation", "D", 1, "generate each image for D by itself")
""",
    )
    source.insert(
        "gan/step.py",
        "fake = generate(begin, count)",
        """                if layout.uses("half_fakes"):
                    fake = torch.cat([generate(i, 1) for i in range(begin, begin + count)])
""",
    )
    script = 'frugan.train(few, recipe="dcgan", out=out, half_fakes="yes", norm_g="none", width_g=4, width_d=4, **SMALL)'
    source.run(script, tmp_path / "r", few)
    plan = json.loads((tmp_path / "r" / "plan.json").read_text())
    assert plan["layouts"]["D"]["half_fakes"] and "half_fakes" not in plan["layouts"]["G"]
    assert plan["guarantee"] == "reassociation"
    assert len(source.touched) <= 2


def test_a_data_source(source: Copy, tmp_path: Path) -> None:
    source.write(
        "data/sources/arrays.py",
        """
from pathlib import Path
import numpy as np
from frugan.data.sources.base import ArraySource

def arrays(data):
    path = Path(data.data)
    return ArraySource(path.stem, np.load(path), None, ()) if path.suffix == ".npy" else None
""",
    )
    source.append("data/sources/__init__.py", "\n\nfrom frugan.data.sources.arrays import arrays\n\nOPENERS.append(arrays)\n")
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 256, (32, 8, 8), np.uint8))
    source.run('frugan.train(few, recipe="dcgan", out=out, width_g=4, width_d=4, **SMALL)', tmp_path / "r", tmp_path / "noise.npy")
    assert (tmp_path / "r" / "final_generated_images.png").exists()
    assert len(source.touched) <= 2


def test_a_command(source: Copy, tmp_path: Path, few: Path) -> None:
    source.write(
        "cli/count.py",
        """
from dataclasses import dataclass
from frugan.cli.parsing import Command

@dataclass(kw_only=True)
class Count:
    \"\"\"Counts to a number.\"\"\"

    to: int = 3

COMMAND = Command(lambda _: Count, lambda said: print(*range(1, said.to + 1)))
""",
    )
    source.insert("cli/__init__.py", '"summary": summary.COMMAND', '    "count": count.COMMAND,\n')
    source.insert("cli/__init__.py", "from frugan.cli.parsing", "from frugan.cli import count\n")
    assert source.run('frugan.cli.main(["count", "--to", "4"])', tmp_path, few).strip() == "1 2 3 4"
    assert len(source.touched) <= 2


def test_a_metric_on_features_of_its_own(source: Copy, tmp_path: Path, few: Path) -> None:
    source.write(
        "evaluation/families/brightness.py",
        """
from frugan.evaluation.families.base import Family, Metric

class Mean:
    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, first, images):
        self.total += float(images.float().mean()) * len(images)
        self.count += len(images)

class BrightnessFamily(Family[Mean]):
    name = "brightness"
    metrics = {"brightness": Metric("Brightness", False, 3, "difference of the mean pixels")}

    def new(self, images):
        return Mean()

    def compared(self, real, fake):
        return {"brightness": abs(real.total / real.count - fake.total / fake.count)}

    def needs(self):
        return 1 << 20
""",
    )
    source.append(
        "evaluation/families/__init__.py",
        "\n\nfrom frugan.evaluation.families.brightness import BrightnessFamily\n\nregister(BrightnessFamily)\n",
    )
    script = 'frugan.cli.main(["evaluate", few, few, "--metrics", "brightness", "--samples", "32", "--json"])'
    assert json.loads(source.run(script, tmp_path, few))["metrics"] == {"brightness": 0.0}
    assert len(source.touched) <= 2


def test_a_tracker(source: Copy, tmp_path: Path, few: Path) -> None:
    source.append(
        "reporting/trackers.py",
        """

class Counter:
    \"\"\"Counts what it is told.\"\"\"

    def __init__(self, folder: RunFolder, images: int, tell: Tell) -> None:
        self.file, self.count = folder.path / "counted.txt", 0

    def line(self, line: Line) -> None:
        self.count += 1

    def event(self, event: Event) -> None:
        pass

    def images(self, name: str, picture: Image.Image, images_seen: int) -> None:
        pass

    def close(self) -> None:
        self.file.write_text(str(self.count))


TRACKERS["counter"] = Counter
""",
    )
    script = 'frugan.train(few, recipe="dcgan", out=out, trackers="counter", report_every=1, width_g=4, width_d=4, **SMALL)'
    source.run(script, tmp_path / "r", few)
    assert (tmp_path / "r" / "counted.txt").read_text() == "4"
    assert len(source.touched) == 1


def test_a_diagnostic(source: Copy, tmp_path: Path, few: Path) -> None:
    source.append(
        "training/diagnostics.py",
        """

class Seen(Diagnostic):
    \"\"\"Says that there was a report.\"\"\"

    kind = "seen"

    def line(self, line: Line) -> str | None:
        return f"A report after {line.images} images."


DIAGNOSTICS.append(Seen)
""",
    )
    source.run('frugan.train(few, recipe="dcgan", out=out, width_g=4, width_d=4, **SMALL)', tmp_path / "r", few)
    warned = [line for line in lines(tmp_path / "r") if line.get("event") == "warning"]
    assert [line["kind"] for line in warned] == ["seen"]
    assert len(source.touched) == 1
