"""The plain PyTorch loop that the benchmarks compare with: what the tutorials show, with frugan's networks and losses.

Single precision unless told otherwise, contiguous images, Adam as it comes, gradients for D computed (and thrown away) in G's
phase, whole batches, gradient penalties by double backward. What it shares with frugan, noise included, makes parity checkable.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from frugan.draws import Draws, Rows
from frugan.networks import Network
from frugan.objective import LOSSES, squared_norm
from frugan.recipe import Recipe


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

    def update(self, real: Tensor, first: int) -> None:
        """One update of both by images ``[n, c, h, w]`` in [-1, 1]; noise as frugan draws it after ``first`` images."""
        recipe, n = self.recipe, len(real)
        objective, loss = recipe.objective, LOSSES[type(recipe.objective)]
        cast: Callable[[], object] = (lambda: torch.autocast(real.device.type, torch.bfloat16)) if self.bf16 else nullcontext

        def noise(purpose: str) -> Tensor:
            return self.draws.normal(purpose, first, n, recipe.network.latent_dim).to(real)

        def judge(images: Tensor, scope: str) -> Tensor:
            with cast():
                return self.discriminator(images, Rows(self.draws, scope, first, n)).to(real.dtype)

        def penalty(logits: Tensor, images: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
            return squared_norm(gradient)

        self.optimizer_d.zero_grad()
        with cast():
            fake = self.generator(noise("latent/d")).detach().to(real.dtype)
        real, fake = real.detach().requires_grad_(objective.r1 > 0), fake.requires_grad_(objective.r2 > 0)
        real_logits, fake_logits = judge(real, "real"), judge(fake, "fake")
        terms = loss.discriminator(objective, real_logits, fake_logits)
        if objective.r1:
            terms = terms + objective.r1 * penalty(real_logits, real)
        if objective.r2:
            terms = terms + objective.r2 * penalty(fake_logits, fake)
        terms.mean().backward()
        self.optimizer_d.step()

        self.optimizer_g.zero_grad()
        with cast():
            fake = self.generator(noise("latent/g"))
        fake_logits = judge(fake.to(real.dtype), "g/fake")
        real_logits = judge(real.detach(), "g/real") if loss.paired else None
        loss.generator(objective, fake_logits, real_logits).mean().backward()
        self.optimizer_g.step()


def plain(recipe: Recipe, generator: Network, discriminator: Network, *, bf16: bool = False) -> Plain:
    """The plain loop of ``recipe`` on these networks."""
    options = recipe.optimizer
    betas = (options.beta1, options.beta2)
    return Plain(
        recipe, generator, discriminator,
        torch.optim.Adam(generator.parameters(), lr=options.lr_g, betas=betas),
        torch.optim.Adam(discriminator.parameters(), lr=options.lr_d, betas=betas),
        Draws(recipe.training.seed, next(generator.parameters()).device), bf16,
    )  # fmt: skip
