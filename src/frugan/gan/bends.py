"""Gradients of gradient penalties in four passes, for discriminators that are linear but for where their activations bend.

Leaky ReLUs, convolutions, dense layers, means and residual sums make a network that is linear wherever no activation bends, so that
its gradient at an image says all of its slope there. With g_l, the gradient of a sample's logit at the output of layer l, a_l what
the layer was given, c the loss's derivative in the logit and v that in the gradient at the image, the gradient of both in the
layer's weights is

    g_l (c a_l + u_l)^T,

where u_l is what v has become on its way to the layer. s_l = c a_l + u_l makes that way itself, from s_0 = c x + v, with c times
the biases and with the bends where they were for the image. So there are four passes: the image forwards, the gradient back, s
forwards, and the gradients of the weights, where differentiating twice takes six. What is needed of all layers at once is the
maps after the bends, and g.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from frugan.gan.networks import Network
from frugan.gan.networks.blocks import Average, Block, Dropout, Head, Mean
from frugan.gan.networks.convolutions import Conv2d
from frugan.gan.networks.r3 import Residual
from frugan.memory import levers, private
from frugan.memory.batch_statistics import carrying
from frugan.utils.draws import Rows

WEIGHTED = (nn.Conv2d, Conv2d, Mean, nn.Linear)  # linear in what they are given, but for a bias
LINEAR = (nn.Flatten, nn.Identity, nn.Sequential, nn.ModuleList, Average, Dropout, Block, Head, Residual)

Pack = Callable[[Tensor], Any]  # what a tensor is kept as
Unpack = Callable[[Any], Tensor]
Weighted = Callable[..., Tensor]


def bends_alone(network: nn.Module) -> bool:
    """Whether ``network`` gives one logit for each image and is linear but for leaky ReLUs, by the classes of all its modules."""
    known = (*WEIGHTED, *LINEAR, nn.LeakyReLU)
    return (
        type(network) is Network
        and type(network.blocks[-1]) is Head
        and all(type(m) in known for m in network.modules() if m is not network)
    )


class Trail:
    """What passing images has left in a block: maps after its bends, and the gradients at the outputs of its weighted layers, each
    in the order in which they were passed."""

    def __init__(self, pack: Pack, unpack: Unpack) -> None:
        self._pack, self._unpack = pack, unpack
        self._maps: deque[Any] = deque()
        self._gradients: deque[Any] = deque()

    def keep(self, maps: Tensor) -> int:
        """Notes maps after a bend; their number."""
        self._maps.append(self._pack(maps.detach()))
        return len(self._maps) - 1

    def maps(self, number: int) -> Tensor:
        """Those that were noted as ``number``."""
        return self._unpack(self._maps[number])

    def watch(self, made: Tensor) -> None:
        """Notes the gradient at ``made`` once it is there."""
        number = len(self._gradients)
        self._gradients.append(None)

        def note(gradient: Tensor) -> None:
            self._gradients[number] = self._pack(gradient)

        made.register_hook(note)  # type: ignore[no-untyped-call]  # of what it is now: an activation may overwrite it

    def next_maps(self) -> Tensor:
        """The first maps that are left, which are let go of."""
        return self._unpack(self._maps.popleft())

    def next_gradient(self) -> Tensor:
        """The first gradient that is left, which is let go of."""
        return self._unpack(self._gradients.popleft())


class Passage:
    """Images on their way through a discriminator and back.

    Args:
        network: one that `bends_alone`, whose weights take no gradients now.
        images: ``[n, c, h, w]``.
        rows: the samples they are.
        recompute: keep the inputs of blocks and the gradients at their ends, and compute the rest of each again. Bitwise the same.
        pack: what tensors that are needed later are kept as.
        unpack: makes tensors of these again.

    Attributes:
        logits: ``[n]``, a leaf.
    """

    def __init__(
        self, network: Network, images: Tensor, rows: Rows, *, recompute: bool, pack: Pack, unpack: Unpack
    ) -> None:  # fmt: skip
        self._blocks: list[nn.Module] = [*network.blocks]
        self._images, self._rows = images.detach(), rows
        self._trail = partial(Trail, pack, unpack)
        self._pack, self._unpack = pack, unpack
        self._trails: deque[Trail] = deque()
        self._entries: list[Any] = []  # of blocks that are computed again
        self._ends: deque[Any] = deque()
        with torch.set_grad_enabled(not recompute):
            x = self._images.requires_grad_(not recompute)
            for block in self._blocks:
                if recompute:
                    self._entries.append(pack(x))
                    x = block(x, rows)
                else:
                    self._trails.append(trail := self._trail())
                    x = self._passed(block, x, trail)
        self._made: Tensor | None = x  # with its graph
        self.logits = x.detach().to(images.dtype).requires_grad_(True)

    def back(self) -> Tensor:
        """The gradient of each image's logit at the image, ``[n, c, h, w]``, a leaf."""
        made, self._made = self._made, None
        assert made is not None
        if self._trails:
            (gradient,) = torch.autograd.grad(made.sum(), self._images)
            self._images = self._images.detach()
        else:
            gradient = torch.ones_like(made)
            for number in reversed(range(len(self._blocks))):
                self._ends.appendleft(self._pack(gradient))
                _, gradient = self._again(number, self._ends[0])
        return gradient.requires_grad_(True)

    def learn(self, direction: Tensor) -> None:
        """Adds to the gradients of the weights that take any those of a loss.

        Args:
            direction: the loss's derivative in the gradient at the images; that in `logits` is their ``.grad``, if any.
        """
        shares, passing = self.logits.grad, direction
        if shares is not None:
            passing = torch.addcmul(passing, self._images, shares[:, None, None, None])
        with torch.no_grad():
            for number, block in enumerate(self._blocks):
                if self._ends:
                    trail, _ = self._again(number, self._ends.popleft())
                    self._entries[number] = None
                else:
                    trail = self._trails.popleft()
                with _instead(block, partial(_carried, trail, shares), partial(_masked, trail)):
                    passing = block(passing, self._rows)

    def _again(self, number: int, end: Any) -> tuple[Trail, Tensor]:
        """The trail of a block, whose gradient at its end is given, and that at its beginning."""
        trail, x = self._trail(), self._unpack(self._entries[number]).detach().requires_grad_(True)
        with torch.enable_grad():
            made = self._passed(self._blocks[number], x, trail)
            loss = carrying(made, self._unpack(end))
        (gradient,) = torch.autograd.grad(loss, x)
        return trail, gradient

    def _passed(self, block: nn.Module, x: Tensor, trail: Trail) -> Tensor:
        def watched(_: nn.Module, __: str, call: Weighted, *given: Any) -> Tensor:
            made = call(*given)
            trail.watch(made)
            return made

        def bent(layer: nn.LeakyReLU, x: Tensor) -> Tensor:
            made: Tensor = private.applied(_Bend, x, layer, trail)
            return made

        with _instead(block, watched, bent):
            passed: Tensor = block(x, self._rows)
        return passed


class _Bend(Function):
    """A leaky ReLU whose maps the trail keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.LeakyReLU, trail: Trail) -> Tensor:
        made = nn.functional.leaky_relu(x, layer.negative_slope, layer.inplace)
        if layer.inplace:
            ctx.mark_dirty(x)
        ctx.slope, ctx.trail, ctx.number = layer.negative_slope, trail, trail.keep(made)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _along(gradient, ctx.trail.maps(ctx.number), ctx.slope), None, None


def _along(passing: Tensor, maps: Tensor, slope: float) -> Tensor:
    """``passing`` a leaky ReLU that made ``maps``, as a gradient does and as a direction does."""
    made: Tensor = torch.ops.aten.leaky_relu_backward(passing, maps, slope, True)
    return made


def _masked(trail: Trail, layer: nn.LeakyReLU, passing: Tensor) -> Tensor:
    return _along(passing, trail.next_maps(), layer.negative_slope)


def _carried(trail: Trail, shares: Tensor | None, layer: nn.Module, weight: str, call: Weighted, *given: Any) -> Tensor:
    """What ``call`` makes of what passes ``layer``, whose weight and bias learn on the way."""
    parameter, bias, gradient = layer.get_parameter(weight), layer._parameters.get("bias"), trail.next_gradient()
    layer._parameters["bias"] = None
    try:
        with torch.set_grad_enabled(parameter.requires_grad):
            made = call(*given)
            if made.requires_grad:
                levers.backward_from(made, gradient, [parameter])
    finally:
        layer._parameters["bias"] = bias
    made = made.detach()
    if bias is None or shares is None:
        return made
    each = gradient.sum((2, 3), dtype=bias.dtype) if gradient.dim() == 4 else gradient.to(bias.dtype)
    if bias.requires_grad:
        _add(bias, (shares[:, None] * each).sum(0))
    return _shifted(made, (shares[:, None] * bias).to(made.dtype))


def _shifted(maps: Tensor, shift: Tensor) -> Tensor:
    """``maps`` ``[n, c, ...]`` with ``[n, c]`` added in place: a row of pixels at a time, as channels alone are short."""
    if maps.dim() < 4 or maps.is_contiguous() or not maps.is_contiguous(memory_format=torch.channels_last):
        return maps.add_(shift[(...,) + (None,) * (maps.dim() - 2)])
    rows = maps.permute(0, 2, 3, 1).flatten(2)
    rows += shift.repeat(1, maps.shape[3])[:, None]
    return maps


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


@contextmanager
def _instead(
    block: nn.Module, weighted: Callable[..., Tensor], bent: Callable[[nn.LeakyReLU, Tensor], Tensor]
) -> Iterator[None]:  # fmt: skip
    """While open, weighted layers of ``block`` are computed by ``weighted(layer, name of its weight, call, ...)``, and its leaky
    ReLUs by ``bent``."""
    with ExitStack() as after:

        def put(module: nn.Module, name: str, call: Callable[..., Tensor]) -> None:
            setattr(module, name, call)
            after.callback(delattr, module, name)

        for module in block.modules():
            if isinstance(module, WEIGHTED):
                put(module, "forward", partial(weighted, module, "weight", module.forward))
            elif isinstance(module, nn.LeakyReLU):
                put(module, "forward", partial(bent, module))
            elif isinstance(module, Head) and module.classes is not None:
                put(module, "of_classes", partial(weighted, module, "classes", module.of_classes))
        yield
