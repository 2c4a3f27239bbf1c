"""Augmentation of what D sees, real and generated images alike, so that D does not learn few images by heart.

The operations are those of Zhao et al. 2020 (arXiv 2006.10738), each with a chance p, which `Adaptive` finds as Karras et al. 2020
(arXiv 2006.06676) do. Every number that is drawn belongs to a sample. Every operation is computed for every sample, and leaves
those that it is not meant for as they are, so that memory does not depend on p.

Penalties are taken at the augmented images: what D sees is what it can be steep at, a penalty is then the same function of D
with and without augmentation, and no operation need be differentiated twice.

Add an operation by adding its function to `OPERATIONS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frugan.config.augmentation import Augmentation
from frugan.utils.draws import Rows
from frugan.utils.errors import UserError, nearest

REACH = 1 / 8  # of the side: how far `translation` goes (Zhao et al. 2020)
CUT = 1 / 2  # of the side: that of the square which `cutout` takes out
MOST = 0.8  # p at most: above it augmentations leak into samples (Karras et al. 2020, section 2.2)
INTERVAL = 4  # updates of D between two of p (Karras et al. 2020, section 3.1)
SINGLE, PAIRS = 0.6, 0.77  # targets of r_t: two normal distributions that give 0.6 one by one give 0.77 in pairs


@dataclass(frozen=True)
class Operation:
    """A kind of augmentation.

    Args:
        numbers: how many a sample needs, uniform in [0, 1).
        function: images ``[n, c, h, w]`` in [-1, 1], numbers ``[n, numbers]``, and p, the chance that it is applied to a sample,
            to images of the same shape; differentiable in the images.
    """

    numbers: int
    function: Callable[[Tensor, Tensor, float | Tensor], Tensor]


def color(images: Tensor, numbers: Tensor, p: float | Tensor) -> Tensor:
    """Brightness + U(-1/2, 1/2), then saturation * U(0, 2), then contrast * U(1/2, 3/2), each with chance ``p``.

    All three are linear: with the mean g of a pixel's channels and the mean m of the image they are
    k s x + k (1 - s) g + (1 - k) m + b.
    """
    on = numbers[:, :3] < p
    brightness, saturation, contrast = numbers[:, 3:].unbind(1)
    b = torch.where(on[:, 0], brightness - 0.5, 0.0)[:, None, None, None]
    s = torch.where(on[:, 1], 2 * saturation, 1.0)[:, None, None, None]
    k = torch.where(on[:, 2], contrast + 0.5, 1.0)[:, None, None, None]
    shift = (1 - k) * images.mean((1, 2, 3), keepdim=True) + b
    if images.shape[1] == 1:  # grey has no saturation
        return images * k + shift
    return images * (k * s) + (images.mean(1, keepdim=True) * (k * (1 - s)) + shift)


def translation(images: Tensor, numbers: Tensor, p: float | Tensor) -> Tensor:
    """Moved by whole pixels, up to an eighth of the side both ways, with chance ``p``; what comes in is 0."""
    _, _, height, width = images.shape
    on = numbers[:, 0] < p
    down, right = (
        torch.where(on, (u * (2 * reach + 1)).floor() - reach, 0.0).long()
        for u, reach in ((numbers[:, 1], int(height * REACH + 0.5)), (numbers[:, 2], int(width * REACH + 0.5)))
    )
    rows = torch.arange(height, device=images.device) - down[:, None]
    columns = torch.arange(width, device=images.device) - right[:, None]
    there = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    return _moved(images, rows.clamp(0, height - 1), columns.clamp(0, width - 1)).masked_fill(~there[:, None], 0.0)


def cutout(images: Tensor, numbers: Tensor, p: float | Tensor) -> Tensor:
    """A square of half the side, its middle anywhere in the image, is 0, with chance ``p``."""
    _, _, height, width = images.shape
    inside = []
    for u, length in ((numbers[:, 1], height), (numbers[:, 2], width)):
        side = int(length * CUT + 0.5)
        begin = (u * (length + 1 - side % 2)).floor()[:, None] - side // 2
        place = torch.arange(length, device=images.device)
        inside.append((place >= begin) & (place < begin + side))
    cut = inside[0][:, :, None] & inside[1][:, None, :] & (numbers[:, 0] < p)[:, None, None]
    return images.masked_fill(cut[:, None], 0.0)


def _moved(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``images[i, :, rows[i]][..., columns[i]]`` of each sample i; rows ``[n, h]`` and columns ``[n, w]`` within the image."""
    n, c, h, w = images.shape
    flat = (rows[:, :, None] * w + columns[:, None, :]).view(n, 1, h * w).expand(n, c, h * w)
    return images.reshape(n, c, h * w).gather(2, flat).view(n, c, h, w)


OPERATIONS: dict[str, Operation] = {
    "color": Operation(6, color),
    "translation": Operation(3, translation),
    "cutout": Operation(3, cutout),
}


class Augment:
    """What D sees of images: the operations of ``policy``, each with chance ``p``.

    Args:
        policy: names of `OPERATIONS`, with commas, in the order in which they are applied.
        p: the chance of each, for each sample.

    Attributes:
        place: where p lies on the device, ``[]``, for as long as it is read from there.

    Raises:
        UserError: an operation that there is not, or none at all.
    """

    def __init__(self, policy: str, p: float = 1.0) -> None:
        names = [name.strip() for name in policy.split(",") if name.strip()]
        if not names:
            raise UserError(f"--augment-policy names no operation: use {','.join(OPERATIONS)}, or --augment none.")
        for name in names:
            if name not in OPERATIONS:
                raise UserError(f"there is no operation {name!r} in --augment-policy: {nearest(name, OPERATIONS)}")
        self.operations = [OPERATIONS[name] for name in names]
        self.p = p
        self.place: Tensor | None = None

    def chance(self, like: Tensor) -> Tensor:
        """p, ``[]``, where and as ``like`` is."""
        return like.new_full((), self.p) if self.place is None else self.place.to(like, copy=True)

    def __call__(self, images: Tensor, rows: Rows) -> Tensor:
        """Images ``[n, c, h, w]`` in [-1, 1] as D sees them: for the same use of the same samples always the same.

        Args:
            images: of the samples that ``rows`` name.
            rows: where numbers come from, and what the images are used for (their scope).
        """
        counts = [operation.numbers for operation in self.operations]
        numbers = rows.draws.uniform(f"augment/{rows.scope}", rows.first, rows.count, sum(counts)).to(images.device)
        for operation, own in zip(self.operations, torch.split(numbers, counts, 1), strict=True):
            images = operation.function(images, own, self.p if self.place is None else self.place).to(images.dtype)
        return images


class Adaptive:
    """Finds p: it rises while D overfits, and falls while it does not (Karras et al. 2020, section 3.1).

    D overfits when r_t = E[sign(D(x))] over the real images that it is trained on is above its target. Where D's logits have no
    zero of their own (`frugan.gan.losses.Loss.centred`) it is E[sign(D(x) - D(G(z)))], in pairs.

    Args:
        augment: whose ``p`` it is; begins at 0.
        target: of r_t.
        images: in which p can go from 0 to 1.
        batch: images of an update.
    """

    def __init__(self, augment: Augment, target: float, images: int, batch: int) -> None:
        self.augment = augment
        self.target = target
        self.step = INTERVAL * batch / images
        self.sum: Tensor | None = None  # of r_t, over the updates since p moved; on the device, which is not waited for
        self.updates = 0
        augment.p = 0.0

    def plus(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The sum with what D's phase measured; takes nothing in yet, as memory may run out."""
        return terms["r_t"].clone() if self.sum is None else self.sum + terms["r_t"]

    def take_in(self, total: Tensor) -> None:
        """Takes in what `plus` gave after an update."""
        self.sum, self.updates = total, self.updates + 1
        if self.updates == INTERVAL:
            excess = float(total) / INTERVAL - self.target
            direction = (excess > 0) - (excess < 0)
            self.augment.p = min(MOST, max(0.0, self.augment.p + direction * self.step))
            self.sum, self.updates = None, 0

    def capture(self) -> dict[str, Any]:
        """Everything that changes, as JSON has it."""
        return {"p": self.augment.p, "sum": None if self.sum is None else float(self.sum), "updates": self.updates}

    def restore(self, state: Mapping[str, Any], like: Tensor) -> None:
        """Becomes what `capture` gave; the sum is kept where and as ``like`` is."""
        self.augment.p, self.updates = float(state["p"]), int(state["updates"])
        self.sum = None if state["sum"] is None else like.new_tensor(state["sum"])


def augment(options: Augmentation) -> Augment | None:
    """What D sees of images, if it is not the images themselves; ``options`` without ``auto``.

    Raises:
        UserError: as for `Augment`.
    """
    return None if options.augment == "none" else Augment(options.augment_policy)


def adaptive(options: Augmentation, augment: Augment | None, batch: int, centred: bool) -> Adaptive | None:
    """What finds p, if it is not the same all the time; the arguments as `Adaptive` has them."""
    if augment is None or options.augment != "ada":
        return None
    target = options.ada_target or (SINGLE if centred else PAIRS)
    return Adaptive(augment, target, options.ada_images, batch)
