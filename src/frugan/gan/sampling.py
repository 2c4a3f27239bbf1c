"""Images from a trained generator, on any machine, without the data it was trained on."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from frugan.config.recipe import Recipe
from frugan.gan.networks import Network, build
from frugan.gan.step import evaluating
from frugan.utils import checkpoint, device
from frugan.utils.draws import Draws, Rows
from frugan.utils.errors import UserError

CHUNK = 64  # images made at once, so that memory does not grow with their number


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

    def generate(self, n: int = 16, *, seed: int = 0, first: int = 0) -> Tensor:
        """Makes ``n`` images: uint8 ``[n, channels, size, size]`` on the CPU. Image i of a seed is the same for every ``n``.

        Args:
            n: how many.
            seed: of their noise.
            first: the number of the first one.
        """
        if n < 1:
            raise UserError(f"the number of images to generate must be at least 1, not {n}.")
        return self.decode(Draws(seed).normal("sample", first, n, self.recipe.network.latent_dim))

    def interpolate(self, seeds: Sequence[int], frames: int = 16) -> Tensor:
        """Goes from the first image of each seed to that of the next in ``frames`` steps, along the sphere on which noise lies.

        Returns:
            uint8 ``[(len(seeds) - 1) * frames + 1, channels, size, size]``.
        """
        if len(seeds) < 2:
            raise UserError("interpolation needs at least two seeds.")
        if frames < 1:
            raise UserError(f"the number of frames between two seeds must be at least 1, not {frames}.")
        ends = [Draws(seed).normal("sample", 0, 1, self.recipe.network.latent_dim)[0] for seed in seeds]
        steps = [slerp(a, b, i / frames) for a, b in pairwise(ends) for i in range(frames)]
        return self.decode(torch.stack([*steps, ends[-1]]))

    def decode(self, noise: Tensor) -> Tensor:
        """Noise ``[n, latent_dim]`` to uint8 images ``[n, channels, size, size]`` on the CPU."""
        return to_images(self.network, noise)


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
    network, _ = build(recipe.network, size, channels)
    for prefix in ("ema/module.", "generator/"):  # a whole checkpoint will do as well
        if any(name.startswith(prefix) for name in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    network.load_state_dict(tensors)
    return Generator(network.to(device.choose(device_name)).eval(), recipe, int(state["images"]))
