"""Images from a trained generator, on any machine, without the data it was trained on."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from frugan.config.recipe import Recipe as Recipe
from frugan.gan.networks import Network, build
from frugan.gan.step import evaluating
from frugan.utils import checkpoint, device
from frugan.utils.draws import Draws, Rows
from frugan.utils.errors import UserError

CHUNK = 64  # images made at once, so that memory does not grow with their number
MOST = 2.0  # times that noise may be scaled: beyond, nothing was trained


class Generator:
    """A trained generator.

    Attributes:
        recipe: what it was trained with.
        images_seen: how long it was trained.
    """

    def __init__(self, network: Network, recipe: Recipe, images_seen: int) -> None:
        self.network = network
        self.recipe = recipe
        self.images_seen = images_seen

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that can be asked for; none if it was trained without."""
        return tuple(self.recipe.classes.names[number] for number in self.recipe.classes.present)

    def generate(
        self, n: int = 16, *, seed: int = 0, first: int = 0, classes: str | int | Sequence[str | int] = (), truncation: float = 1.0
    ) -> Tensor:  # fmt: skip
        """Makes ``n`` images: uint8 ``[n, channels, size, size]`` on the CPU. Image i of a seed is the same for every ``n``.

        Args:
            n: how many.
            seed: of their noise.
            first: the number of the first one.
            classes: of the images, one or several in turn, by names or numbers; unset: as often as the data has them, drawn by
                ``seed``.
            truncation: what noise is multiplied by, 0 to `MOST`: below 1 images are more typical, above it more varied.

        Raises:
            UserError: a class that there is not, or one is asked for and there are none; or truncation outside its range.
        """
        if n < 1:
            raise UserError(f"the number of images to generate must be at least 1, not {n}.")
        classes = [classes] if isinstance(classes, (str, int)) else classes
        noise = _truncated(Draws(seed).normal("sample", first, n, self.recipe.network.latent_dim), truncation)
        return self.decode(noise, in_turn(self._found(classes), first, n) if classes else self.drawn(n, seed=seed, first=first))

    def drawn(self, n: int, *, seed: int = 0, first: int = 0) -> Tensor | None:
        """The classes of what `generate` makes where none are asked for: int64 ``[n]``; None: it was trained without."""
        return natural(self.recipe, seed, first, n)

    def interpolate(
        self, seeds: Sequence[int], frames: int = 16, *, of: str | int | None = None, truncation: float = 1.0
    ) -> Tensor:  # fmt: skip
        """Goes from the first image of each seed to that of the next in ``frames`` steps, along the sphere on which noise lies.

        Args:
            seeds: at least two.
            frames: from one to the next.
            of: the class of all images; unset: that of the first image, if there are classes.
            truncation: as `generate` has it.

        Returns:
            uint8 ``[(len(seeds) - 1) * frames + 1, channels, size, size]``.
        """
        if len(seeds) < 2:
            raise UserError("interpolation needs at least two seeds.")
        if frames < 1:
            raise UserError(f"the number of frames between two seeds must be at least 1, not {frames}.")
        ends = [Draws(seed).normal("sample", 0, 1, self.recipe.network.latent_dim)[0] for seed in seeds]
        steps = [slerp(a, b, i / frames) for a, b in pairwise(ends) for i in range(frames)]
        noise = _truncated(torch.stack([*steps, ends[-1]]), truncation)
        one = in_turn(self._found([of]), 0, 1) if of is not None else natural(self.recipe, seeds[0], 0, 1)
        return self.decode(noise, None if one is None else one.expand(len(noise)))

    def decode(self, noise: Tensor, classes: Tensor | None = None) -> Tensor:
        """Noise ``[n, latent_dim]``, and the numbers of ``classes`` int64 ``[n]`` if there are any, to uint8 images
        ``[n, channels, size, size]`` on the CPU."""
        if classes is None and self.classes:
            raise UserError(f"this generator makes images of {len(self.classes)} classes: give one for each row of noise.")
        return to_images(self.network, noise, classes=classes)

    def _found(self, classes: Sequence[str | int]) -> list[int]:
        if not self.classes:
            raise UserError(f"there is no class {classes[0]!r}: this generator was trained without; --conditional trains one with.")
        return self.recipe.classes.find(map(str, classes))


def _truncated(noise: Tensor, truncation: float) -> Tensor:
    """``noise`` scaled, as Karras et al. 2019 (arXiv 1812.04948, appendix B) scale what is made of it.

    Raises:
        UserError: ``truncation`` is below 0 or above `MOST`.
    """
    if not 0 <= truncation <= MOST:
        raise UserError(f"--truncation must be from 0 to {MOST:g}, not {truncation:g}.")
    return noise if truncation == 1 else noise * truncation


def in_turn(classes: Sequence[int], first: int, count: int) -> Tensor:
    """The classes of images ``first`` to ``first + count`` that have ``classes`` in turn: int64 ``[count]``."""
    return torch.tensor(classes)[torch.arange(first, first + count) % len(classes)]


def natural(recipe: Recipe, seed: int, first: int, count: int) -> Tensor | None:
    """The classes of images ``first`` to ``first + count``, as often as the data has them: int64 ``[count]``, drawn for each image
    by ``seed``; None if ``recipe`` (resolved) learns none."""
    if not recipe.classes:
        return None
    ends = torch.tensor(recipe.classes.counts, dtype=torch.float64).cumsum(0)
    place = Draws(seed).uniform("sample/class", first, count).double() * ends[-1]
    return torch.bucketize(place, ends, right=True)


def to_images(network: nn.Module, noise: Tensor, chunk: int = CHUNK, classes: Tensor | None = None) -> Tensor:
    """Runs a generator on ``chunk`` samples at a time: noise ``[n, latent_dim]``, and ``classes`` int64 ``[n]`` if it learnt them,
    to uint8 ``[n, c, h, w]`` on the CPU."""
    like = next(network.parameters())
    draws = Draws(0, like.device)  # nothing draws while evaluating
    pieces = []
    with evaluating(network):
        for first in range(0, len(noise), chunk):
            some = noise[first : first + chunk].to(like)
            of = None if classes is None else classes[first : first + chunk].to(like.device)
            images = network(some, Rows(draws, "sample", first, len(some), of)).float().clamp_(-1, 1)
            pieces.append(images.add_(1).mul_(127.5).round_().to("cpu", torch.uint8).contiguous())
    return torch.cat(pieces)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The point at ``share`` of the way from ``a`` to ``b`` along the great circle (Shoemake 1985), length interpolated too."""
    angle = torch.arccos((torch.dot(a, b) / (a.norm() * b.norm())).clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def save(path: Path, network: nn.Module, recipe: Recipe, images_seen: int) -> None:
    """Writes a generator's weights with the recipe in the header, so that the file alone is enough to use it."""
    state = {"recipe": recipe.to_toml(), "images": images_seen}
    checkpoint.save(path, network.state_dict(), state)


def load(path: Path, device_name: str = "cpu") -> Generator:
    """The generator in a ``generator.safetensors`` or in a whole checkpoint.

    Args:
        path: of the file.
        device_name: where it shall run.

    Raises:
        UserError: there is none, or the file is damaged.
    """
    if not path.exists():
        raise UserError(f"there is no run {path}.")
    tensors, state = checkpoint.load(path)
    recipe = Recipe.from_toml(state["recipe"], str(path))
    channels, size, _ = recipe.data.shape
    network, _ = build(recipe.network, size, channels, classes=len(recipe.classes))
    for prefix in ("ema/module.", "generator/"):  # a whole checkpoint will do as well
        if any(name.startswith(prefix) for name in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    network.load_state_dict(tensors)
    return Generator(network.to(device.choose(device_name)).eval(), recipe, int(state["images"]))
