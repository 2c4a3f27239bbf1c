"""A variational autoencoder (Kingma and Welling 2013, arXiv 1312.6114) trained on Fashion-MNIST within a memory budget.

    python examples/vae.py PATH/TO/fashion-mnist --memory 1GiB [--batch 4096] [--epochs 3]

The model knows nothing of frugan. What the engine asks for: a loss with one term a sample, and what it draws at random given
with the batch, so that cutting the batch changes nothing.
"""

import gzip
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from frugan.memory import Engine
from frugan.memory.limit import peak
from frugan.utils.errors import UserError
from frugan.utils.units import size


class Vae(nn.Module):
    """Images ``[n, 1, 28, 28]`` in [0, 1] to a normal distribution over codes, and codes back to logits of pixels."""

    def __init__(self, codes: int = 16, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, width, 4, 2, 1), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Flatten(), nn.Linear(98 * width, 2 * codes)),
        )
        self.decoder = nn.Sequential(
            nn.Sequential(nn.Linear(codes, 98 * width), nn.Unflatten(1, (2 * width, 7, 7)), nn.ReLU(inplace=True)),
            nn.Sequential(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.ReLU(inplace=True)),
            nn.Sequential(nn.ConvTranspose2d(width, 1, 4, 2, 1)),
        )


def loss(model: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    """The negative evidence lower bound of each image, ``[n]``, in nats."""
    assert isinstance(model, Vae)
    pixels = images.float() / 255
    mean, log_variance = model.encoder(pixels).chunk(2, dim=1)
    logits = model.decoder(mean + noise * (log_variance / 2).exp())
    reconstruction = binary_cross_entropy_with_logits(logits, pixels, reduction="none").flatten(1).sum(1)
    divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1) / 2
    return reconstruction + divergence


def read(folder: Path) -> Tensor:
    """The training images of a folder of IDX files, gzipped or not: uint8 ``[n, 1, 28, 28]``."""
    file = next(folder.glob("train-images*idx3-ubyte*"), None)
    if file is None:
        raise UserError(f"there is no train-images-idx3-ubyte in {folder}: name a folder of IDX files, as of Fashion-MNIST.")
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)


@dataclass
class Options:
    data: tyro.conf.Positional[Path]
    memory: str | None = None
    batch: int = 4096
    epochs: int = 3
    seed: int = 0


def main(options: Options) -> float:
    torch.manual_seed(options.seed)
    images = read(options.data)
    batch = min(options.batch, len(images))
    model = Vae()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    engine = Engine(model, loss, optimizer, batch=batch, memory=options.memory, blocks=[*model.encoder, *model.decoder])
    choice = engine.plan(images[:1], torch.zeros(1, 16))
    layout = choice.chosen["the step"].layout
    print(f"Batches of {batch}: {layout} ({choice.guarantee}), {size(engine.predicted)} predicted.")
    bound = float("nan")
    with engine:
        for epoch in range(options.epochs):
            begin, order, sums = time.perf_counter(), torch.randperm(len(images)), []
            for rows in order.split(batch):
                if len(rows) == batch:
                    sums.append(engine.step(images[rows], torch.randn(batch, 16)))
            bound = float(torch.stack(sums).mean())
            rate = len(sums) * batch / (time.perf_counter() - begin)
            print(f"epoch {epoch + 1}: {bound:.2f} nats an image, {rate:,.0f} images/s, at most {size(peak(engine.device) or 0)}")
    return bound


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UserError as error:
        sys.exit(f"vae.py: {error}")
