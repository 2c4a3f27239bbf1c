"""Whether images may be mirrored: asked of the images themselves, by a probe that learns to tell them from their mirror images."""

import math

import torch
from torch import Tensor, nn

from frugan.config.recipe import Recipe, read
from frugan.data.loader import Loader
from frugan.data.sources.base import Tell
from frugan.gan.optim import FrugalAdam
from frugan.reporting.run_folder import RunFolder
from frugan.utils.draws import Order, derive

SIDE = 16  # pixels that images are brought to
IMAGES = 2000  # that are looked at, at most
FEWEST = 64  # of which something can be learnt
BATCH = 64
PIECE = 1 << 20  # numbers of images that are brought to `SIDE` at once
UPDATES = 120
RATE = 6e-3
ROUNDING = 1e-4  # a score below it is none
TOLD_APART = 0.6  # share of unseen images told from their mirror images: from there on mirroring is not safe
# Of images that look the same mirrored it tells half, by chance. Of others at least 2 * share - 1 show which way round they are:
# from 0.6 on a fifth of the images, which mirrored would be a tenth of what D takes for real, and real is none of it.


class Probe(nn.Module):
    """How much more an image looks the right way round than mirrored: ``[n, c, SIDE, SIDE]`` to ``[n]``, above 0 if it does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(16, 32, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True),
            nn.Flatten(), nn.Dropout(0.5), nn.Linear(32 * (SIDE // 4) ** 2, 1), nn.Flatten(0),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """The score of the images minus that of their mirror images: mirroring changes its sign, so that no label is needed."""
        right, mirrored = self.layers(torch.cat([images, images.flip(3)])).chunk(2)
        return right - mirrored  # type: ignore[no-any-return]


def told_apart(images: Tensor) -> float:
    """The share of images that a probe which has not seen them tells from their mirror images; a half is chance.

    Args:
        images: `small` ones, at least two; each half is looked at by a probe that the other half taught.
    """
    order = Order(derive(0, "mirroring"), len(images)).read(0, len(images))
    halves = images[order[: len(images) // 2]], images[order[len(images) // 2 :]]
    right = 0.0
    for learnt, unseen in (halves, halves[::-1]):
        scores = _taught(learnt)(unseen)
        shown = scores.abs() > ROUNDING  # an image that is its own mirror image shows nothing
        right += float((shown & (scores > 0)).sum() + (~shown).sum() / 2)
    return right / len(images)


@torch.no_grad()
def small(images: Tensor) -> Tensor:
    """uint8 ``[n, c, h, w]`` to float32 ``[n, c, SIDE, SIDE]`` in [-1, 1]."""
    x = images.cpu().float().div_(127.5).sub_(1)
    return nn.functional.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True)


def _taught(images: Tensor) -> Probe:
    """A probe that was trained on ``images``."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(derive(0, "probe"))
        probe = Probe(images.shape[1])
        optimizer = FrugalAdam(probe.parameters(), RATE, (0.9, 0.99))
        for update in range(UPDATES):
            optimizer.param_groups[0]["lr"] = RATE * (1 - update / UPDATES)
            some = images[torch.randint(len(images), (BATCH,))]
            loss = nn.functional.softplus(-probe(some)).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for parameter in probe.parameters():
        parameter.requires_grad_(False)
    return probe.eval()


def decided(recipe: Recipe, loader: Loader, folder: RunFolder, tell: Tell) -> Recipe:
    """``recipe`` with ``--flip auto`` answered: as the run in ``folder`` was started, else by the images."""
    if recipe.data.flip != "auto":
        return recipe
    if folder.plan_file.exists() and folder.recipe_file.exists():
        return recipe.replace(flip=read(folder.recipe_file).data.flip)
    flip, why = _asked(loader)
    tell(f"--flip auto: {why}, so that images are {'' if flip == 'yes' else 'not '}mirrored.")
    return recipe.replace(flip=flip)


def _asked(loader: Loader) -> tuple[str, str]:
    """Whether to mirror, and why."""
    if not loader.random_access:
        return "no", "a stream cannot be asked whether it looks the same mirrored"
    if len(loader) < FEWEST:
        return (
            "no",
            f"{len(loader)} {'images are' if len(loader) > 1 else 'image is'} too few to ask whether they look the same mirrored",
        )
    count = min(len(loader), IMAGES)
    size = max(1, PIECE // math.prod(loader.shape))
    pieces = (loader.batch(first, min(size, count - first)) for first in range(0, count, size))
    share = told_apart(torch.cat([small(piece) for piece in pieces]))
    told = f"a probe tells {share:.0%} of images from their mirror images (chance is 50%, safe is below {TOLD_APART:.0%})"
    return "yes" if share < TOLD_APART else "no", told
