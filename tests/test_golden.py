"""Golden runs: the first losses of every recipe. A refactor must not move them; what is meant to goes into the CHANGELOG.

To write them anew: ``python -m tests.test_golden``.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import frugan
from frugan.config import recipes
from frugan.reporting.run_folder import RunFolder

GOLDEN = Path(__file__).with_name("golden.json")
# What a recipe would take long with, or has of the machine; high rates amplify how processors round to 1% in forty updates.
SLOW = {"lr_g": 2e-4, "lr_d": 2e-4}
OWN = {"resize": {"precision": "fp32"} | SLOW, "projected": {"precision": "fp32", "feature_updates": 20, "feature_width": 8} | SLOW}


def first_losses(recipe: str, out: Path) -> list[list[float]]:
    frugan.train(
        "digits", out=out, recipe=recipe, batch_size=32, epochs=1, width_g=8, width_d=8, latent_dim=8, report_every=8,
        accumulation_steps=2, whole_batch_norm="no", quiet=True, device="cpu", threads=1, **OWN.get(recipe, {}),
    )  # fmt: skip
    return [[line.measured[k] for k in ("Loss_D", "Loss_G", "D(x)", "D(G(z))")] for line in RunFolder(out).read_log()][:5]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Training sets them for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_the_first_losses_stand(recipe: str, tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())[recipe]
    # Processors differ in how they round, and training amplifies it.
    torch.testing.assert_close(torch.tensor(first_losses(recipe, tmp_path)), torch.tensor(expected), rtol=2e-3, atol=2e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {name: first_losses(name, Path(folder) / name) for name in recipes.RECIPES}
    rounded = {name: [[round(v, 5) for v in line] for line in lines] for name, lines in found.items()}
    GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n")
