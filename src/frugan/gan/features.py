"""Features learnt from the images at hand before a GAN is trained on them: the frozen part of a projected discriminator.

The encoder learns to tell classes apart, or by how many quarter turns an image is rotated (Gidaris et al. 2018, arXiv 1803.07728),
on images that are shifted, and mirrored if training mirrors them. Images larger than `SIDE` are seen in pieces of that size, some
cut from them as they are, some averaged before, so that all scales are met and the time does not grow with the images.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from frugan.config.architectures import Projected
from frugan.config.recipe import Recipe, Training
from frugan.data.loader import Batch
from frugan.gan.networks.blocks import Average
from frugan.gan.networks.projected import ProjectedDiscriminator
from frugan.gan.optim import FrugalAdam
from frugan.gan.passes import DTYPES, normalise
from frugan.gan.step import Step
from frugan.memory.layout import slices, split
from frugan.utils.draws import Draws, derive

SIDE = 64  # pixels of what the encoder learns from, at most
BATCH = 128  # images in an update, and
LARGE_BATCH = 64  # of those beyond
LARGE = 32  # pixels
EPOCHS = 40  # at most
SHORT, LONG = 400, 2000  # updates where they are not said: for short trainings, for long ones of small images, and between these
SHARE, A_MINUTE = 300, 100  # one for so many images of the training, or so many for each of its minutes
HELD_OUT = 1000  # images, or a tenth, on which it is examined
QUIET = 0.1  # of a level's mean root mean square: the least that a channel counts as when all are brought to one scale
SHIFT = 16  # images are shifted by up to this part of their side


@dataclass(frozen=True)
class Course:
    """What the encoder sees: ``updates`` of ``batch`` images, out of ``learnt`` that come after ``held_out`` others.

    Small sets are seen at most `EPOCHS` times. What is not trained is only scaled, in no update.
    """

    updates: int
    batch: int
    learnt: int
    held_out: int

    @classmethod
    def of(cls, options: Projected, training: Training, size: int, images: int, epoch: int) -> "Course":
        """For ``images`` images of ``size`` pixels that are there at first, before a ``training`` whose epochs have ``epoch``."""
        held_out = min(HELD_OUT, images // 10)
        batch = min(BATCH if size <= LARGE else LARGE_BATCH, images - held_out)
        worth = A_MINUTE * training.minutes if training.minutes is not None else training.epochs * epoch / SHARE
        most = options.feature_updates or min(LONG if size <= LARGE else SHORT, max(SHORT, round(worth)))
        updates = max(1, min(most, EPOCHS * (images - held_out) // batch))
        return cls(0 if options.features == "random" else updates, batch, images - held_out, held_out)

    def first(self, update: int) -> int:
        """The number of the first image of an update: over and over those of the first epoch, in its order."""
        return self.held_out + update * self.batch % (self.learnt - self.batch + 1)


class Answers(nn.Module):
    """A dense layer for each task on the deepest level: ``[n, c, h, w]`` to a list of logits ``[n, answers]``."""

    def __init__(self, channels: int, side: int, tasks: Sequence[int]) -> None:
        super().__init__()
        grid = min(4, side)
        self.pool = Average(grid)
        self.layers = nn.ModuleList(nn.Linear(channels * grid**2, answers) for answers in tasks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """As the class says."""
        flat = self.pool(x).flatten(1)
        return [layer(flat) for layer in self.layers]


class FeatureStep:
    """Trains the encoder of ``discriminator`` in place, in micro-batches that add up to the gradient of the whole batch.

    Args:
        options: of the architecture, its ``features`` resolved.
        discriminator: on its device.
        step: of the GAN, whose precision, memory format and mirroring it has. fp16 needs a scale that is not kept here: fp32 then.
        classes: how many the labels have.
        size: of the images, in pixels.
        seed: of what is drawn.
    """

    def __init__(
        self, options: Projected, discriminator: ProjectedDiscriminator, step: Step, *, classes: int, size: int, seed: int
    ) -> None:
        self.options = options
        self.levels = discriminator.encoder
        self.encoder = nn.Sequential(*self.levels)
        self.step = step
        self.size = size
        self.draws = Draws(seed, step.like.device)
        self.tasks = {}  # names to numbers of answers
        if options.features in ("labels", "both"):
            self.tasks["labels"] = classes
        if options.features != "labels":
            self.tasks["rotations"] = 4
        side = min(size, SIDE)
        for _ in self.levels[1:]:
            side = -(-side // 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "answers"))
            self.answers = Answers(self.levels[-1].out_channels, side, [*self.tasks.values()]).to(step.like)
        self.parameters = [p for module in (self.encoder, self.answers) for p in module.parameters()]
        self.optimizer = FrugalAdam(self.parameters, options.feature_rate, (0.9, 0.999))
        self.rate = options.feature_rate

    def held(self) -> list[Tensor]:
        """What is there besides the discriminator while the encoder learns."""
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return [*moments, *self.answers.parameters(), *self.draws.kept()]

    def begin(self) -> None:
        """The encoder begins anew, from the seed alone: whatever the rest of the networks is like, it learns the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.draws.seed, "features"))
            for level in self.levels:
                level.begin()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """While open, the encoder learns; afterwards it is frozen again, without gradients."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def gradients(self, data: Batch, course: Course, update: int, micro_batch: int) -> Tensor:
        """Adds the gradients of the mean over one batch.

        Args:
            data: images by their numbers, and their classes.
            course: says which images belong to the update.
            update: its number, which also says what is drawn.
            micro_batch: the most images at a time.

        Returns:
            The mean loss, the sum of the tasks' cross entropies, without graph.
        """
        total = torch.zeros((), device=self.step.like.device)
        first = course.first(update)
        for begin, count in slices(split(course.batch, -(-course.batch // micro_batch))):
            x, turns = self._seen(data.images(first + begin, count), "learn", update * course.batch + begin, update)
            answers = self._answers(x)
            loss = torch.stack([
                cross_entropy(logits, self._right(task, turns, data, first + begin), reduction="sum")
                for task, logits in zip(self.tasks, answers, strict=True)
            ]).sum() / course.batch  # fmt: skip
            torch.autograd.backward(loss, inputs=self.parameters)
            total += loss.detach()
        return total

    def rehearse(self, data: Batch, count: int) -> None:
        """Adds gradients for ``count`` images, all taken to be of one class: what learning allocates where it allocates most."""
        data = Batch(data.images, lambda _, n: torch.zeros(n, dtype=torch.long))
        widest = max(range(16), key=lambda update: self._averaged("learn", update))
        self.gradients(data, Course(1, count, count, 0), widest, count)

    def update(self, done: float) -> None:
        """An update by the gradients there are, after ``done`` of the course (0 to 1)."""
        self.optimizer.param_groups[0]["lr"] = self.rate * (1 - done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def examine(self, data: Batch, course: Course, micro_batch: int) -> dict[str, float]:
        """The share of held-out images that each task is right about, by the task's name."""
        if not (course.updates and course.held_out):
            return {}
        right = dict.fromkeys(self.tasks, 0)
        for first in range(0, course.held_out, micro_batch):
            count = min(micro_batch, course.held_out - first)
            x, turns = self._seen(data.images(first, count), "examine", first, first)
            for task, logits in zip(right, self._answers(x), strict=True):
                right[task] += int((logits.argmax(1) == self._right(task, turns, data, first)).sum())
        return {task: count / course.held_out for task, count in right.items()}

    @torch.no_grad()
    def calibrate(self, data: Batch, count: int, micro_batch: int) -> None:
        """Scales every channel of every level to a root mean square of 1, or less, over the first ``count`` images.

        Rectifiers commute with positive scales: what one convolution's outputs lose, the next one's weights gain, and the encoder
        computes the same but for its scales, which heads without normalisation need to be alike. Whole images are looked at: as
        many at a time as ``micro_batch`` pieces of them are large. A channel that these images hardly touch would drown all
        others as soon as another image does: it is scaled as if it had `QUIET` of the level's mean.
        """
        some = max(1, micro_batch * SIDE**2 // max(SIDE, self.size) ** 2)
        for depth, level in enumerate(self.levels):
            total: Tensor | float = 0.0
            for first in range(0, count, some):
                x = self._layout(normalise(data.images(first, min(some, count - first)), None, self.step.like))
                with self.autocast():
                    x = self.encoder[: depth + 1](x)
                total = total + x.to(self.step.like.dtype).square().mean((2, 3)).sum(0)
            assert isinstance(total, Tensor)
            scale = (total / count).sqrt()
            least = QUIET * scale.mean()
            scale = torch.where(least > 1e-6, torch.maximum(scale, least), torch.ones_like(scale))
            level.weight.div_(scale[:, None, None, None])
            level.bias.div_(scale)
            for after in self.levels[depth + 1 : depth + 2]:
                after.weight.mul_(scale[:, None, None])

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """While open, the encoder computes in bf16 if the GAN does."""
        if self.step.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.step.like.device.type, DTYPES["bf16"])

    def _answers(self, x: Tensor) -> list[Tensor]:
        with self.autocast():
            return [logits.to(self.step.like.dtype) for logits in self.answers(self.encoder(x))]

    def _right(self, task: str, turns: Tensor, data: Batch, first: int) -> Tensor:
        if task == "rotations":
            return turns
        found = data.labels(first, len(turns))
        assert found is not None
        return found.to(turns.device)

    def _seen(self, images: Tensor, purpose: str, row: int, update: int) -> tuple[Tensor, Tensor]:
        """Pieces of uint8 images ``[n, c, h, w]`` as the encoder sees them, and by how many quarter turns they are rotated."""
        device = self.step.like.device
        drawn = self.draws.uniform(purpose, row, len(images), 4)
        images = images.to(device)
        by = self._averaged(purpose, update)
        window, room = self.size, self.size // SHIFT
        begin = ((2 * room + 1) * drawn[:, :2]).long() - room
        if self.size > SIDE:
            window = SIDE * by
            begin = ((self.size - window + 1) * drawn[:, :2]).long()
        there = (begin[:, :, None] + torch.arange(window)).clamp_(0, self.size - 1).to(device)
        which = torch.arange(len(images), device=device)[:, None, None]
        pieces = images[which, :, there[:, 0, :, None], there[:, 1, None, :]].permute(0, 3, 1, 2)
        turns = torch.zeros(len(images), dtype=torch.long, device=device)
        if self.step.flip:  # before they are rotated: the other way round a quarter to the left would become one to the right
            pieces = torch.where((drawn[:, 3] < 0.5).to(device)[:, None, None, None], pieces.flip(3), pieces)
        if "rotations" in self.tasks:
            turns = (4 * drawn[:, 2]).long().to(device)
            pieces = rotated(pieces, turns)
        x = normalise(pieces, None, self.step.like)
        return self._layout(avg_pool2d(x, by) if by > 1 else x), turns

    def _averaged(self, purpose: str, update: int) -> int:
        """By how much images are averaged, so that pieces of them show more: a power of two."""
        scales = max(1, (self.size // SIDE).bit_length())
        return 1 << int(scales * float(self.draws.uniform(f"{purpose}/scale", update, 1)))

    def _layout(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.step.channels_last else images


def rotated(images: Tensor, turns: Tensor) -> Tensor:
    """Square images ``[n, c, s, s]``, each rotated by its number of quarter ``turns``, int64 ``[n]``."""
    half, quarter = (turns // 2 == 1)[:, None, None, None], (turns % 2 == 1)[:, None, None, None]
    images = torch.where(half, images.flip(2, 3), images)
    return torch.where(quarter, images.transpose(2, 3).flip(2), images)


def feature_step(recipe: Recipe, discriminator: nn.Module, step: Step, classes: int = 1) -> FeatureStep | None:
    """What learns the features that D is built on; None if it is not built on any.

    Args:
        recipe: its images and architecture resolved.
        discriminator: whose features they are.
        step: of the GAN.
        classes: that images have.
    """
    if not (isinstance(recipe.network, Projected) and isinstance(discriminator, ProjectedDiscriminator)):
        return None
    _, size, _ = recipe.data.shape
    seed = recipe.training.seed
    return FeatureStep(recipe.network, discriminator, step, classes=classes, size=size, seed=seed)
