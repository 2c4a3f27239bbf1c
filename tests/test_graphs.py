"""What a phase asks of the host is all on its tape. `tests/test_device.py` records phases where there is CUDA."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from frugan.config import recipes
from frugan.config.classes import Classes
from frugan.config.recipe import Recipe
from frugan.data.loader import Batch
from frugan.gan.levers import LEVERS, allowed, named
from frugan.memory.calls import tensors_in
from frugan.memory.layout import Layout
from frugan.training.graphs import HOST, Recorded
from frugan.training.state import Mean, State

from . import sim
from .conftest import SMALL

CPU = torch.device("cpu")
if not sim.missing():
    sim.setup()  # before autograd has counted devices
WAYS: list[dict[str, Any]] = [
    {"recipe": name} for name in recipes.RECIPES
] + [
    {"recipe": "dcgan", "flip": "yes", "augment": "diff", "conditional": True},
    {"recipe": "dcgan", "conditional": True, "class_sampling": "balanced", "objective": "hinge"},
    {"recipe": "mlp", "dropout": 0.3},
    {"recipe": "dcgan", "augment": "ada"},
    {"recipe": "r3", "flip": "yes", "conditional": True, "augment": "diff", "augment_policy": "translation,cutout"},
    {"recipe": "dcgan", "objective": "wgan-gp", "norm_d": "group"},
]  # fmt: skip


def state_of(way: dict[str, Any], device: torch.device) -> tuple[State, Recipe]:
    own = {k: v for k, v in SMALL.items() if k not in ("recipe", "quiet", "device", "threads", "sample_every", "report_every")}
    settings = own | {k: v for k, v in way.items() if k != "recipe"} | {"lr_g": 2**-10, "lr_d": 2**-9, "precision": "fp32"}
    recipe = recipes.get(way["recipe"]).replace(**settings, channels=1)
    recipe = replace(recipe, network=recipe.network.resolved(3), augmentation=recipe.augmentation.settled(100))
    if recipe.training.conditional:
        recipe = replace(recipe, classes=Classes(("a", "b", "c"), (9, 9, 9)))
    return State(recipe, device), recipe


def images(device: torch.device) -> Callable[[int], Batch]:
    kept = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    return lambda _: Batch(lambda first, n: kept[first : first + n], lambda first, n: torch.arange(first, first + n) % 3)


def numbers(state: State) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.capture()[0].items()}


class Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where something is read from, or brought to, another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in([args, kwargs or {}, result]):
            nowhere = tensor.device.type == "meta"  # where torch works out the shape of a sum with zeros
            number = not tensor.dim() and tensor.device.type == "cpu"
            assert tensor.device == self.device or nowhere or number, (func, tensor.device)
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for a number"
        return result


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_a_phase_from_its_tape_computes_what_it_does_without(way: dict[str, Any]) -> None:
    plain, _ = state_of(way, CPU)
    taped, _ = state_of(way, CPU)
    layout = Layout((8, 5, 3))
    batch = images(CPU)
    recorded = {name: Recorded(phase, layout, taped, CPU) for name, phase in taped.phases.items()}
    means, kept = (Mean(), Mean()), dict[str, Tensor]()  # where a graph leaves its terms, the next update's lie over them
    for first in (0, 16, 32):
        for state in (plain, taped):
            if state.step.augment:
                state.step.augment.p = first / 50  # as `Adaptive` moves it
        for name, phase in plain.phases.items():
            terms = phase.compute(batch(first), first, layout)
            plain.update(phase.optimizer)
            of_tape = recorded[name]
            of_tape.put(batch(first), first)
            of_tape.update(first)
            of_tape.tape.closed = True
            assert terms.keys() == of_tape.terms.keys()
            assert all(torch.equal(terms[key], of_tape.terms[key]) for key in terms), name
            for key, value in of_tape.terms.items():
                kept.setdefault(key, torch.zeros(())).copy_(value)
            for mean, found in zip(means, (terms, {key: kept[key] for key in terms}), strict=True):
                mean.take_in(mean.plus(found))
    assert means[0].take() == means[1].take()
    ours = numbers(taped)
    assert all(torch.equal(tensor, ours[key]) for key, tensor in numbers(plain).items())
    assert taped.step.draws is not recorded["D"].tape and taped.optimizer_d.param_groups[0]["lr"] == 2**-9


@pytest.mark.skipif(bool(sim.missing()), reason="no simulated device")
@pytest.mark.parametrize("levers", [set(), {lever.name for lever in LEVERS.values()} - HOST], ids=["plain", "levers"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_a_phase_from_its_tape_stays_on_the_device(way: dict[str, Any], levers: set[str]) -> None:
    device = torch.device("sim:0")
    state, recipe = state_of(way, device)
    coupled = state.generator.couples_samples, state.discriminator.couples_samples
    batch = images(CPU)
    for phase in state.phases.values():
        may = {lever.name for lever, values in allowed(recipe, phase.name, device, coupled).items() if True in values}
        recorded = Recorded(phase, Layout((8, 8), named(levers & may)), state, device)
        recorded.put(batch(0), 0)
        recorded.update(0)
        recorded.tape.closed = True
        recorded.put(batch(16), 16)
        with Alone(device):
            recorded.update(16)
