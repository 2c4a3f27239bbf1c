"""Do the metrics tell good from bad? An untrained, a briefly and a fully trained generator, and real images not trained on.

    python benchmarks/quality.py --data ../shared/data/fashion-mnist [--run runs/quality] [--epochs 8]

Trains a dcgan of width 32, unless ``--run`` is trained already, and evaluates each: 10,000 samples against 10,000 training images.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

import frugan
from frugan.data.pack_loader import PackLoader
from frugan.data.sources import open_source
from frugan.evaluation.evaluator import Evaluator
from frugan.evaluation.families import METRICS, shown
from frugan.evaluation.families.base import Options
from frugan.gan import sampling
from frugan.gan.networks import build
from frugan.utils.checkpoint import all_in


@dataclass
class Arguments:
    data: str = "../shared/data/fashion-mnist"  # images with a test split
    run: str = "runs/quality"
    epochs: int = 8
    samples: int = 10_000


def main(arguments: Arguments) -> None:
    ways = {"width_g": 32, "width_d": 32, "evaluate_every": 1, "sample_every": 1, "keep_checkpoints": arguments.epochs}
    run = frugan.train(arguments.data, epochs=arguments.epochs, out=arguments.run, **ways)
    trained, brief = frugan.load(run), frugan.load(all_in(run / "checkpoints")[0])
    data = trained.recipe.data
    channels, size, _ = data.shape
    with tempfile.TemporaryDirectory() as folder:
        untrained = Path(folder) / "untrained.safetensors"
        sampling.save(untrained, build(trained.recipe.network, size, channels)[0], trained.recipe, 0)
        generators = {"untrained": frugan.load(untrained), "1 epoch": brief, f"{arguments.epochs} epochs": trained}

    def loader(split: str) -> tuple[PackLoader, int]:
        asked = type(data)(**(vars(data) | {"data": arguments.data, "split": split}))
        source = open_source(asked)
        return PackLoader(source, asked, seed=0, workers=2, tell=print), len(source.classes)

    real, classes = loader("train")
    evaluator = Evaluator(real, "fashion-mnist", classes, Options(reals=arguments.samples), torch.device("cpu"), print)
    columns = {
        name: evaluator(lambda first, n, g=g: g.generate(n, first=first), arguments.samples) for name, g in generators.items()
    }  # fmt: skip
    held_out, _ = loader("test")
    columns["test images"] = evaluator(held_out.batch, min(arguments.samples, len(held_out)))
    table = Table(title="metrics")
    for heading in ("metric", *columns):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for name in evaluator.metrics:
        table.add_row(METRICS[name].label, *(shown(name, values[name]) for values in columns.values()))
    Console(width=120).print(table)
    print(evaluator.protocol(arguments.samples, "samples"))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
