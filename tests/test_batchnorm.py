"""Batch norm over the whole batch: micro-batches give the gradients and the running statistics of the batch computed at once."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from frugan.config.architectures import Architecture, Dcgan, Mlp, Upsample
from frugan.config.objectives import Bce, Objective, RpGan
from frugan.gan.levers import named
from frugan.gan.networks import build
from frugan.gan.step import Step
from frugan.memory.layout import Layout
from frugan.utils.draws import Draws

from .test_exactness import micro_batches

SMALL = {"latent_dim": 5, "width_g": 4, "width_d": 4}
NETWORKS: dict[str, Architecture] = {
    f"{kind.kind}, {where}": kind(**SMALL, norm_g="none" if where == "D" else "batch", norm_d="none" if where == "G" else "batch")
    for kind in (Dcgan, Upsample, Mlp)
    for where in ("G", "D", "both")
}
EXACT = "whole_batch_norm"


def away_from_the_start(*networks: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (p for network in networks for p in network.double().parameters()):
            p.add_(torch.randn_like(p), alpha=0.1)


def outcome(options: Architecture, objective: Objective, sizes: Iterable[int], levers: Iterable[str] = ()) -> dict[str, Tensor]:
    """Gradients, running statistics and measurements of both phases."""
    generator, discriminator = build(options, 12, 2)
    away_from_the_start(generator, discriminator)
    layout = Layout(tuple(sizes), named(levers))
    images = torch.randint(0, 256, (sum(layout.sizes), 2, 12, 12), dtype=torch.uint8)
    step = Step(generator, discriminator, objective, options.latent_dim, Draws(3), flip=True)
    found = {}
    for name, phase in (("d", step.discriminator_phase), ("g", step.generator_phase)):
        found |= {f"{name}/{k}": v for k, v in phase(lambda row, n: images[row - 7 : row - 7 + n], 7, layout).items()}
        for part, network in (("g", generator), ("d", discriminator)):
            found |= {f"{name}/{part}.{k}": p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
            found |= {f"{name}/{part}.{k}": b.clone() for k, b in network.named_buffers()}
            network.zero_grad()
    return found | {"score": step.score_generated(7, layout)}


def assert_equal(whole: dict[str, Tensor], parts: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert whole.keys() == parts.keys()
    scale = max(v.double().norm() for v in whole.values())
    for name, value in whole.items():
        error = (value - parts[name]).double().norm() / value.double().norm().clamp_min(1e-6 * scale)
        assert error < tolerance, (name, float(error))


@settings(max_examples=60)
@given(
    network=st.sampled_from(sorted(NETWORKS)),
    objective=st.sampled_from([Bce(label_smoothing=0.1), RpGan(r1=0, r2=0)]),
    sizes=micro_batches(7),
    levers=st.sets(st.sampled_from(["separate_terms", "recompute_generator", "checkpoint_blocks"])),
)
def test_any_cut_gives_the_gradients_and_running_statistics_of_the_whole_batch(
    network: str, objective: Objective, sizes: list[int], levers: set[str]
) -> None:
    whole = outcome(NETWORKS[network], objective, [7])
    assert_equal(whole, outcome(NETWORKS[network], objective, sizes, {*levers, EXACT}))
