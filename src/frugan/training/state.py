"""The state of a training: everything that it changes, and how that is written down and read back."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from frugan.config.recipe import Recipe
from frugan.data.sources.base import Tell
from frugan.gan import sampling
from frugan.gan.build import adaptation, average, freeze, lay_out, make_step, optimizers, phases
from frugan.gan.networks import build
from frugan.gan.optim import rate_factor
from frugan.gan.step import Labels as Labels
from frugan.gan.step import Terms as Terms
from frugan.gan.transfer import check_frozen, said, take_weights
from frugan.utils.checkpoint import Tensors
from frugan.utils.draws import Draws

PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # what changes in it; the rest are settings


class Mean:
    """Means of what a step measures, over a stretch of updates; kept on the device, so that the device is not waited for."""

    def __init__(self) -> None:
        self.sums: Terms = {}
        self.counts: dict[str, int] = {}

    def plus(self, terms: Mapping[str, Tensor]) -> Terms:
        """The sums with one update's terms; takes nothing in yet, as memory may run out."""
        # A copy of the first: where phases are recorded, the next update writes its terms over these.
        return {name: self.sums[name] + value if name in self.sums else value.clone() for name, value in terms.items()}

    def take_in(self, sums: Terms) -> None:
        """Takes in what `plus` gave."""
        self.sums |= sums
        self.counts |= {name: self.counts.get(name, 0) + 1 for name in sums}

    def take(self) -> dict[str, float]:
        """The means so far; begins anew."""
        means = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


class State:
    """Everything that training changes, and how it is written down and read back.

    Args:
        recipe: what is trained, resolved.
        device: on what.
        weights: of another training to start from, as it captured them; ``tell`` says what of them fits.
        tell: is called with what a person should know.
        origin: the recipe of those weights, if it is known: blocks are matched by the sizes of their maps.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, weights: Tensors | None = None, tell: Tell = print,
        origin: Recipe | None = None,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        options = recipe.optimizer
        channels, size, _ = recipe.data.shape
        self.generator, self.discriminator = build(recipe.network, size, channels, recipe.training.seed, len(recipe.classes))
        self.has_features = False  # whether frozen features of D, if it is built on any, are another run's
        if weights is not None:
            taken = take_weights(weights, self.generator, self.discriminator, recipe, origin)
            check_frozen(taken, self.discriminator, recipe)
            self.has_features = not self.discriminator.frozen() & {name.split(" ")[0] for name in taken["discriminator"].new}
            for sentence in said(taken, recipe, origin):
                tell(sentence)
        lay_out(recipe, self.generator, self.discriminator)
        self.generator.to(device)
        self.discriminator.to(device)
        freeze(recipe, self.discriminator)
        self.step = make_step(recipe, self.generator, self.discriminator)
        self.scaler = self.step.scaler
        self.optimizer_g, self.optimizer_d = optimizers(recipe, self.generator, self.discriminator, device)
        self.phases = phases(self.step, self.optimizer_g, self.optimizer_d, recipe.training.discriminator_steps)
        self.ema = average(recipe, self.generator, device)
        self.plateau_g, self.plateau_d = (
            ReduceLROnPlateau(o, factor=options.schedule_factor, patience=options.schedule_patience, threshold=0)
            for o in (self.optimizer_g, self.optimizer_d)
        )
        self.images = self.updates = 0
        self.epoch_mean = Mean()
        self.adaptation = adaptation(recipe, self.step)

    def set_rates(self, epochs: float, share: float) -> None:
        """Sets both learning rates as the schedule says after ``epochs`` epochs, when ``share`` of the training is behind; plateau,
        which looks at losses, sets its own."""
        options = self.recipe.optimizer
        if options.schedule != "plateau":
            factor = rate_factor(options, epochs, share)
            self.optimizer_g.param_groups[0]["lr"] = options.lr_g * factor
            self.optimizer_d.param_groups[0]["lr"] = options.lr_d * factor

    def rates(self) -> dict[str, float]:
        """The learning rates of both optimizers, by the names of their settings."""
        return {"lr_g": self.optimizer_g.param_groups[0]["lr"], "lr_d": self.optimizer_d.param_groups[0]["lr"]}

    def update(self, optimizer: Adam) -> None:
        """One update by the gradients that are there, which are let go of."""
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def sample(self, seed: int, first: int, count: int, chunk: int, classes: Sequence[int] = ()) -> Tensor:
        """Images of the generator to use, ``chunk`` at a time: uint8 ``[count, c, h, w]``; of ``classes`` in turn, if any."""
        noise = Draws(seed).normal("sample", first, count, self.recipe.network.latent_dim)
        of = sampling.in_turn(classes, first, count) if classes else sampling.natural(self.recipe, seed, first, count)
        return sampling.to_images(self.averaged, noise, chunk, of)

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
        } | ({"augment": self.adaptation.capture()} if self.adaptation else {})

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
        if self.adaptation and "augment" in state:
            self.adaptation.restore(state["augment"], like)
        return anew

    def _networks(self) -> Iterator[tuple[str, nn.Module]]:
        yield "generator", self.generator
        yield "discriminator", self.discriminator
        if self.ema:
            yield "ema", self.ema

    def _optimizers(self) -> Iterator[tuple[str, nn.Module, Adam]]:
        yield "optimizer_g", self.generator, self.optimizer_g
        yield "optimizer_d", self.discriminator, self.optimizer_d
