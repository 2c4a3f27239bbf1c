"""What passes samples through both networks: noise and images in, images and logits out, computed as a layout says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from frugan.data.loader import Batch, Labels
from frugan.gan.augment import Augment as Augment
from frugan.gan.networks import Network
from frugan.memory import levers
from frugan.memory.batchnorm import WholeBatches
from frugan.memory.layout import Layout
from frugan.utils.draws import Draws, Rows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Part = tuple[int, int]  # the number of the first sample of a micro-batch, and how many there are


def normalise(images: Tensor, mirrored: Tensor | None, like: Tensor) -> Tensor:
    """uint8 images ``[n, c, h, w]`` to [-1, 1], on the device and in the dtype of ``like``, those in ``mirrored`` flipped."""
    images = images.to(like.device, non_blocking=True)
    if mirrored is not None:
        images = torch.where(mirrored.to(like.device)[:, None, None, None], images.flip(3), images)
    return images.to(like.dtype).div_(127.5).sub_(1)


def with_channels_last(images: Tensor) -> Tensor:
    """Images ``[n, c, h, w]`` in that memory format: with one channel too, where torch takes either for both, and layers go on with
    what they are given."""
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class Passes:
    """Base of `frugan.gan.step.Step`, which says what the attributes are."""

    generator: Network
    discriminator: Network
    latent_dim: int
    draws: Draws
    flip: bool
    augment: Augment | None
    precision: str
    channels_last: bool
    conditional: bool
    balanced: tuple[int, ...]
    reuse_fakes: bool
    four_passes: bool
    keeps: bool

    def __post_init__(self) -> None:
        self.like = next(self.generator.parameters())  # its device and dtype are the networks'
        self._whole = WholeBatches()  # by the scopes of rows
        self._latent_g = "latent/d" if self.reuse_fakes else "latent/g"  # the noise of G's phase
        self.keeps = False
        self._kept: tuple[Part, Tensor] | None = None  # generated images, with their graph

    def latents(self, purpose: str, first: int, count: int) -> Tensor:
        """Rows of noise ``[count, latent_dim]`` on the device."""
        return self.draws.normal(purpose, first, count, self.latent_dim).to(self.like)

    def _of_real(self, first: int, count: int, labels: Labels) -> Rows:
        """The real images ``first`` to ``first + count``."""
        classes = labels(first, count) if self.conditional else None
        return Rows(self.draws, "real", first, count, None if classes is None else classes.to(self.like.device))

    def _of_fake(self, scope: str, first: int, count: int, labels: Labels) -> Rows:
        """As many generated ones, whose noise is drawn for ``scope``.

        A loss that compares each with a real image must not compare classes: both have the same, unless balanced ones are asked
        for.
        """
        if not self.balanced:
            return self._of_real(first, count, labels).used_as(scope)
        classes = self.draws.among(f"class/{scope}", first, count, self.balanced)
        return Rows(self.draws, scope, first, count, classes.to(self.like.device))

    def _generate(self, rows: Rows, *, learns: bool = False, layout: Layout | None = None) -> Tensor:
        """Generated images in the networks' dtype, with a graph to G if it ``learns``."""
        learns = learns and torch.is_grad_enabled()
        saving = self._saving(self.generator, layout if learns else None)
        with torch.set_grad_enabled(learns), self.autocast(), saving, self._whole.passing(rows.scope):
            images: Tensor = self.generator(self.latents(rows.scope, rows.first, rows.count), rows)
            return images.to(self.like.dtype)

    def generate_for_both(self, first: int, count: int, labels: Labels) -> Tensor:
        """Generated images of a whole batch for D's phase, without graph; it is kept for G's phase if `keeps` says so."""
        images = self._generate(self._of_fake("latent/d", first, count, labels), learns=self.keeps)
        if self.keeps:
            self._kept = (first, count), images
        return images.detach()

    def _kept_of(self, parts: Sequence[Part], layout: Layout) -> list[Tensor]:
        """The generated images of ``parts`` that D's phase has kept, once; none for a ``layout`` that saves memory."""
        kept, self._kept = self._kept, None
        return [kept[1]] if kept and [kept[0]] == [*parts] and not layout.levers else []

    def forget(self) -> None:
        """Lets go of a graph that is kept, and keeps none from now on."""
        self.keeps, self._kept = False, None

    def _real(self, batch: Batch, rows: Rows) -> Tensor:
        mirrored = self.draws.uniform("flip", rows.first, rows.count) < 0.5 if self.flip else None
        return self._shown(normalise(batch.images(rows.first, rows.count), mirrored, self.like), rows)

    def _shown(self, images: Tensor, rows: Rows) -> Tensor:
        """Images as D sees them: the only place where they are augmented, for the use that ``rows`` name, and laid out."""
        if self.augment:
            images = self.augment(images, rows)
        return with_channels_last(images) if self.channels_last else images

    def autocast(self) -> AbstractContextManager[object]:
        """While open, networks compute in the precision that was asked for."""
        if self.precision not in DTYPES:
            return nullcontext()
        return torch.autocast(self.like.device.type, DTYPES[self.precision])

    @contextmanager
    def _saving(self, network: Network, layout: Layout | None) -> Iterator[None]:
        """While open, what ``network`` keeps for backward is kept as ``layout`` says."""
        blocks = network.blocks if layout and layout.uses("checkpoint_blocks") else ()
        with self._offloading(network, layout), levers.recomputing(blocks):
            yield

    def _offloading(self, network: Network, layout: Layout | None) -> AbstractContextManager[object]:
        return levers.offloading(self.like.device, bool(layout and layout.uses("offload_activations")), network.parameters())

    def _discriminate(self, images: Tensor, rows: Rows) -> Tensor:
        """Logits ``[n]``, or ``[n, heads]``, in at least single precision."""
        with self.autocast(), self._whole.passing(rows.scope):
            logits: Tensor = self.discriminator(images, rows)
        return logits.to(self.like.dtype)

    def _judge(self, images: Tensor, rows: Rows, layout: Layout) -> Tensor:
        """The same, of which backward needs what ``layout`` has it keep."""
        with self._saving(self.discriminator, layout):
            return self._discriminate(images, rows)

    def _measured(
        self, layout: Layout, parts: Sequence[Part], passes: Mapping[str, Callable[[int, int], Tensor]]
    ) -> AbstractContextManager[object]:
        """While open, batch norm takes its statistics over all of ``parts``, if ``layout`` says so; not for penalties of such a D.

        ``passes`` are by scopes what passes a micro-batch through G (``latent/...``) or D, in the order in which statistics are
        needed.
        """
        if not layout.uses("whole_batch_norm"):
            return nullcontext()
        networks = {scope: self.generator if scope.startswith("latent/") else self.discriminator for scope in passes}
        return self._whole.measured(parts, {scope: (networks[scope], forward) for scope, forward in passes.items()})
