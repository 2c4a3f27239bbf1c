"""Statistics that batch norm takes of a batch, from its micro-batches, and the gradient that goes by them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Call:
    """One call of ``layer``, by all micro-batches of a batch.

    Attributes:
        count: values of each channel that were taken in.
        mean: of them, ``[channels]``.
        spread: their squared distances from it, summed.
        weight, bias: copies of the layer's, whose gradients are those of this call.
    """

    def __init__(self, layer: Any, x: Tensor) -> None:
        self.layer = layer
        self.count = 0
        self.mean = torch.zeros(x.shape[1], device=x.device, dtype=_wide(x).dtype)
        self.spread = torch.zeros_like(self.mean)

    def take_in(self, x: Tensor) -> None:
        """Takes in a micro-batch ``[n, channels, ...]`` (Chan, Golub and LeVeque 1979, equations 2.1)."""
        x = _wide(x)
        others = [d for d in range(x.dim()) if d != 1]
        mean = x.mean(others, keepdim=True)
        spread = (x - mean).square_().sum(others)
        n = x.numel() // x.shape[1]
        apart = mean.flatten() - self.mean
        total = self.count + n
        self.mean = self.mean + apart * (n / total)
        self.spread = self.spread + spread + apart.square() * (self.count * n / total)
        self.count = total

    def settle(self) -> None:
        """All micro-batches are taken in: running statistics move as by one batch.

        Raises:
            ValueError: of one value a channel, as torch does.
        """
        layer = self.layer
        if self.count == 1:
            raise ValueError("Expected more than 1 value per channel when training")
        self.variance = self.spread / self.count
        weight, bias = (
            torch.full_like(self.mean, value) if own is None else own.detach().to(self.mean)
            for own, value in ((layer.weight, 1.0), (layer.bias, 0.0))
        )
        self.weight, self.bias = weight.requires_grad_(True), bias.requires_grad_(True)
        if layer.training and layer.track_running_stats and layer.running_mean is not None:
            layer.num_batches_tracked.add_(1)
            share = 1 / int(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(self.mean.to(layer.running_mean), share)
            layer.running_var.lerp_((self.spread / (self.count - 1)).to(layer.running_var), share)

    def normalise(self, x: Tensor) -> Tensor:
        """What the layer gives for a micro-batch, its statistics being constants."""
        y = self._normalised(x, self.weight, self.bias)
        found: Tensor = _Once.apply(y) if y.requires_grad else y
        return found

    def gradient(self, x: Tensor) -> Tensor:
        """What the loss's gradient at a micro-batch ``x`` has by way of the statistics: the two last terms of dx."""
        assert self.weight.grad is not None and self.bias.grad is not None
        scale = self.weight.detach() * (self.variance + self.layer.eps).rsqrt() / -self.count
        by_h, by_y = scale * self.weight.grad, scale * self.bias.grad
        return self._normalised(x.detach(), by_h, by_y)

    def _normalised(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if x.device.type != "xla":
            return nn.functional.batch_norm(x, self.mean, self.variance, weight, bias, False, 0.0, self.layer.eps)
        # XLA's own has no gradient where statistics are given (torch_xla 2.9); what stands here is fused there anyway.
        scale = weight * (self.variance + self.layer.eps).rsqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        found: Tensor = ((x - self.mean.view(shape)) * scale.view(shape) + bias.view(shape)).to(x.dtype)
        return found

    def finish(self) -> None:
        """Adds the gradients of this call to the layer's own, if it learns."""
        for own, copy in ((self.layer.weight, self.weight), (self.layer.bias, self.bias)):
            if own is not None and own.requires_grad and copy.grad is not None:
                gradient = copy.grad.to(own)
                own.grad = gradient if own.grad is None else own.grad.add_(gradient)


class _Once(torch.autograd.Function):
    """What is there, of which gradients cannot be differentiated: statistics would be taken for constants."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def carrying(tensor: Tensor, gradient: Tensor) -> Tensor:
    """Zero, whose gradient in ``tensor`` is ``gradient``."""
    found: Tensor = _From.apply(tensor, gradient)
    return found


class _From(torch.autograd.Function):
    """A number whose gradient with respect to a tensor is given."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return tensor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def _wide(x: Tensor) -> Tensor:
    """``x`` in a dtype in which sums can be taken."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
