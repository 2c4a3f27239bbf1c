"""The state of a training: everything that it changes, and how that is written down and read back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from frugan.gan.networks import Network
from frugan.gan.optim import Ema
from frugan.gan.step import Terms
from frugan.utils.checkpoint import Tensors

PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # what changes in it; the rest are settings


class Mean:
    """Means of what a step measures, over a stretch of updates; kept on the device, so that the device is not waited for."""

    def __init__(self) -> None:
        self.sums: Terms = {}
        self.counts: dict[str, int] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Takes in one update's terms."""
        sums = {name: self.sums[name] + value if name in self.sums else value for name, value in terms.items()}
        self.sums |= sums  # all of them or, if memory runs out, none
        self.counts |= {name: self.counts.get(name, 0) + 1 for name in terms}

    def take(self) -> dict[str, float]:
        """The means so far; begins anew."""
        means = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


@dataclass
class State:
    """Everything that training changes, and how it is written down and read back."""

    generator: Network
    discriminator: Network
    ema: Ema | None
    optimizer_g: Adam
    optimizer_d: Adam
    scaler: torch.amp.GradScaler
    plateau_g: ReduceLROnPlateau
    plateau_d: ReduceLROnPlateau
    images: int = 0
    updates: int = 0

    def __post_init__(self) -> None:
        self.epoch_mean = Mean()

    @property
    def averaged(self) -> nn.Module:
        """The generator to use: the average if there is one."""
        return self.ema.module if self.ema else self.generator

    def capture(self) -> tuple[Tensors, dict[str, Any]]:
        """All tensors by name, and all numbers as JSON has them."""
        tensors = {f"{part}/{k}": v for part, network in self._networks() for k, v in network.state_dict().items()}
        for part, network, optimizer in self._optimizers():
            for name, parameter in network.named_parameters():
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{part}/{name}/{key}"] = value
        mean = self.epoch_mean
        return tensors, {
            "images": self.images,
            "updates": self.updates,
            "scaler": self.scaler.state_dict(),
            "plateau": [{key: p.state_dict()[key] for key in PLATEAU} for p in (self.plateau_g, self.plateau_d)],
            "rates": [o.param_groups[0]["lr"] for o in (self.optimizer_g, self.optimizer_d)],
            "epoch_mean": {name: [float(value), mean.counts[name]] for name, value in mean.sums.items()},
        }

    def restore(self, tensors: Tensors, state: Mapping[str, Any]) -> int:
        """Becomes what `capture` wrote; of how many parameters the moments begin anew, because they were kept in another way."""
        anew = 0
        for part, network in self._networks():
            own = {k.removeprefix(f"{part}/"): v for k, v in tensors.items() if k.startswith(f"{part}/")}
            if own or part != "ema":
                network.load_state_dict(own)
            else:  # an average that is only now asked for
                self.averaged.load_state_dict(self.generator.state_dict())
        for part, network, optimizer in self._optimizers():
            for name, parameter in network.named_parameters():
                moments = optimizer.state.get(parameter, {})
                there = {key: tensors.get(f"{part}/{name}/{key}") for key in moments}
                if all(value is not None for value in there.values()):
                    for key, value in there.items():
                        moments[key].copy_(value)
                else:
                    anew += 1
        self.images, self.updates = state["images"], state["updates"]
        if state["scaler"]:  # empty where there was no fp16
            self.scaler.load_state_dict(state["scaler"])
        for plateau, numbers in zip((self.plateau_g, self.plateau_d), state["plateau"], strict=True):
            plateau.load_state_dict(numbers)
        like = next(self.generator.parameters())
        for name, (value, count) in state["epoch_mean"].items():
            self.epoch_mean.sums[name] = torch.tensor(value, device=like.device, dtype=like.dtype)
            self.epoch_mean.counts[name] = count
        return anew

    def _networks(self) -> Iterator[tuple[str, nn.Module]]:
        yield "generator", self.generator
        yield "discriminator", self.discriminator
        if self.ema:
            yield "ema", self.ema

    def _optimizers(self) -> Iterator[tuple[str, nn.Module, Adam]]:
        yield "optimizer_g", self.generator, self.optimizer_g
        yield "optimizer_d", self.discriminator, self.optimizer_d


def take_weights(tensors: Tensors, generator: Network, discriminator: Network) -> dict[str, tuple[int, int, list[str]]]:
    """Copies every weight of a captured state, the averaged generator's if there is one, that fits by name and shape.

    Returns:
        For each network how many tensors fitted, of how many, and the names and shapes of those that did not.
    """
    averaged = any(name.startswith("ema/") for name in tensors)
    report = {}
    for name, network, prefix in (
        ("generator", generator, "ema/module." if averaged else "generator/"),
        ("discriminator", discriminator, "discriminator/"),
    ):
        own = network.state_dict()
        there = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        fits = {k: v for k, v in there.items() if k in own and own[k].shape == v.shape}
        network.load_state_dict(fits, strict=False)
        report[name] = (len(fits), len(own), [f"{k} {list(v.shape)}" for k, v in own.items() if k not in fits])
    return report
