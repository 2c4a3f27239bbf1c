"""The PyTorch loops that the benchmarks compare with, with frugan's networks and losses: the tutorials', and a tuned one.

As it comes: single precision, contiguous images, Adam's own kernel, gradients for D computed (and thrown away) in G's phase, whole
batches, penalties by double backward. Each `Tuned` switch is what a careful engineer would write in an afternoon. What the loops
share with frugan, noise included, makes parity checkable.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from frugan.config.recipe import Recipe
from frugan.gan.losses import LOSSES
from frugan.gan.networks import Network
from frugan.gan.penalties import squared_norm
from frugan.utils.draws import Draws, Rows

# What is set before the process starts, so that the C library keeps what is freed for the next tensor.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_ARENA_MAX": "1"}
Images = Callable[[int, int], Tensor]  # (row, count) to images [count, c, h, w] in [-1, 1]


@dataclass(frozen=True)
class Tuned:
    """What is done to the plain loop."""

    micro_batch: int | None = None  # accumulate in micro-batches of so many
    frozen: bool = False  # D takes no gradients in G's phase
    channels_last: bool = False
    fused: bool = False  # Adam in one kernel
    once: bool = False  # images that both phases learn from (``reuse_fakes``) are made once, as in PyTorch's tutorial; else anew


@dataclass
class Plain:
    """Two networks, two optimizers, one update."""

    recipe: Recipe
    generator: Network
    discriminator: Network
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    draws: Draws
    bf16: bool = False
    tuned: Tuned = Tuned()
    kept: list[Tensor] = field(default_factory=list)  # generated images of micro-batches, with their graphs

    def update(self, images: Images, first: int, batch: int) -> None:
        """One update of both by ``batch`` images; noise as frugan draws it after ``first`` images."""
        step = self.tuned.micro_batch or batch
        parts = [(first + begin, min(step, batch - begin)) for begin in range(0, batch, step)]
        self.optimizer_d.zero_grad()
        for row, n in parts:
            self._discriminator(images(row, n), row, n, batch)
        self.optimizer_d.step()
        self.optimizer_g.zero_grad()
        with self._still():
            for row, n in parts:
                self._generator(images, row, n, batch)
        self.optimizer_g.step()

    def _discriminator(self, real: Tensor, row: int, n: int, batch: int) -> None:
        objective, loss = self.recipe.objective, LOSSES[type(self.recipe.objective)]
        once = self.tuned.once and self.recipe.training.reuse_fakes
        with torch.set_grad_enabled(once):
            fake = self._fake("latent/d", row, n)
        if once:
            self.kept.append(fake)
            fake = fake.detach()
        real, fake = self._laid(real).requires_grad_(objective.r1 > 0), fake.requires_grad_(objective.r2 > 0)
        real_logits, fake_logits = self._discriminate(real, "real", row, n), self._discriminate(fake, "fake", row, n)
        terms = loss.discriminator(objective, real_logits, fake_logits)
        for weight, logits, given in ((objective.r1, real_logits, real), (objective.r2, fake_logits, fake)):
            if weight:
                (gradient,) = torch.autograd.grad(logits.sum(), given, create_graph=True)
                terms = terms + weight * squared_norm(gradient)
        (terms.sum() / batch).backward()

    def _generator(self, images: Images, row: int, n: int, batch: int) -> None:
        loss = LOSSES[type(self.recipe.objective)]
        noise = "latent/d" if self.recipe.training.reuse_fakes else "latent/g"
        fake = self.kept.pop(0) if self.kept else self._fake(noise, row, n)
        fake_logits = self._discriminate(fake, "g/fake", row, n)
        real_logits = self._discriminate(self._laid(images(row, n)), "g/real", row, n) if loss.paired else None
        (loss.generator(self.recipe.objective, fake_logits, real_logits).sum() / batch).backward()

    def _fake(self, purpose: str, row: int, n: int) -> Tensor:
        like = next(self.generator.parameters())
        with self._cast():
            fake = self.generator(self.draws.normal(purpose, row, n, self.recipe.network.latent_dim).to(like))
        return self._laid(fake.to(like.dtype))

    def _discriminate(self, images: Tensor, scope: str, row: int, n: int) -> Tensor:
        with self._cast():
            return self.discriminator(images, Rows(self.draws, scope, row, n)).to(images.dtype)

    def _laid(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.tuned.channels_last else images

    def _cast(self) -> torch.autocast | nullcontext[None]:
        return torch.autocast(next(self.generator.parameters()).device.type, torch.bfloat16) if self.bf16 else nullcontext()

    @contextmanager
    def _still(self) -> Iterator[None]:
        """While open, D takes no gradients, if that was asked for."""
        if self.tuned.frozen:
            self.discriminator.requires_grad_(False)
        yield
        self.discriminator.requires_grad_(True)


def plain(
    recipe: Recipe, generator: Network, discriminator: Network, *, bf16: bool = False, tuned: Tuned | None = None
) -> Plain:  # fmt: skip
    """The plain loop of ``recipe`` on these networks, ``tuned`` or not."""
    options, tuned = recipe.optimizer, tuned or Tuned()
    if tuned.channels_last:
        generator.to(memory_format=torch.channels_last)
        discriminator.to(memory_format=torch.channels_last)
    betas = (options.beta1, options.beta2)
    return Plain(
        recipe, generator, discriminator,
        torch.optim.Adam(generator.parameters(), lr=options.lr_g, betas=betas, fused=tuned.fused or None),
        torch.optim.Adam(discriminator.parameters(), lr=options.lr_d, betas=betas, fused=tuned.fused or None),
        Draws(recipe.training.seed, next(generator.parameters()).device), bf16, tuned,
    )  # fmt: skip
