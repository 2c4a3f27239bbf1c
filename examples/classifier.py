"""A small convolutional classifier with dropout, trained by SGD with momentum on any folder of IDX files within a memory budget.

    python examples/classifier.py PATH/TO/fashion-mnist --memory 1GiB [--batch 4096] [--epochs 3]

Dropout draws from torch's global generator: the engine sees that, says that micro-batches draw otherwise than the whole batch,
and draws the same again where it computes something twice.
"""

import gzip
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from frugan.memory import Engine
from frugan.memory.limit import peak
from frugan.utils.errors import UserError
from frugan.utils.units import size


def read(folder: Path, name: str, dimensions: int) -> Tensor:
    """The bytes of the IDX file of a folder that is called so, gzipped or not: uint8, as many ``dimensions`` as it says."""
    file = next(folder.glob(f"{name}*"), None)
    if file is None:
        raise UserError(f"there is no {name}-idx{dimensions}-ubyte in {folder}: name a folder of IDX files, as of Fashion-MNIST.")
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i]) for i in range(dimensions)]
    return torch.frombuffer(bytearray(content[4 + 4 * dimensions :]), dtype=torch.uint8)[: prod(shape)].view(shape)


def network(side: int, width: int = 32) -> nn.Sequential:
    """Images ``[n, 1, side, side]`` to logits ``[n, 10]``, in blocks that may be recomputed."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.1), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.1), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(2 * width * (side // 4) ** 2, 128), nn.ReLU(), nn.Dropout(0.3)),
        nn.Sequential(nn.Linear(128, 10)),
    )


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each image, ``[n]``, in nats."""
    return cross_entropy(model(images.float() / 127.5 - 1), labels, reduction="none")


@dataclass
class Options:
    data: tyro.conf.Positional[Path]
    memory: str | None = None
    batch: int = 4096
    epochs: int = 3
    seed: int = 0


def main(options: Options) -> None:
    torch.manual_seed(options.seed)
    images = read(options.data, "train-images", 3).unsqueeze(1)
    labels = read(options.data, "train-labels", 1).long()
    batch = min(options.batch, len(images))
    model = network(images.shape[-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    engine = Engine(model, loss, optimizer, batch=batch, memory=options.memory, blocks=[*model])
    choice = engine.plan(images[:1], labels[:1])
    layout = choice.chosen["the step"].layout
    print(f"Batches of {batch}: {layout} ({choice.guarantee}), {size(engine.predicted)} predicted.")
    with engine:
        for epoch in range(options.epochs):
            whole = [rows for rows in torch.randperm(len(images)).split(batch) if len(rows) == batch]
            mean = torch.stack([engine.step(images[rows], labels[rows]) for rows in whole]).mean()
            print(f"epoch {epoch + 1}: cross entropy {float(mean):.4f}, at most {size(peak(engine.device) or 0)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UserError as error:
        sys.exit(f"classifier.py: {error}")
