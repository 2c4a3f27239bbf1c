"""What a recipe makes on a device: networks as they are laid out in memory, optimizers, average and step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from frugan.config.recipe import Recipe
from frugan.gan.augment import Adaptive, adaptive, augment
from frugan.gan.levers import of_phase
from frugan.gan.networks import ByProducts, Map, Network, build
from frugan.gan.optim import Ema, FrugalAdam, LowBitAdam, moments_of
from frugan.gan.optim import warm_up_update as warm_up_update
from frugan.gan.step import Batch as Batch
from frugan.gan.step import Step, Terms
from frugan.memory.layout import Layout
from frugan.memory.search import Levers
from frugan.utils.draws import Draws
from frugan.utils.errors import UserError


def lay_out(recipe: Recipe, generator: Network, discriminator: Network) -> None:
    """Does to new networks what the recipe's memory section says: their memory format, what overwrites what, what is a product."""
    layout = torch.channels_last if recipe.memory.channels_last else torch.contiguous_format
    for network in (generator, discriminator):
        network.to(memory_format=layout)
        for module in network.modules():
            if isinstance(module, (nn.LeakyReLU, nn.ReLU)):
                module.inplace = recipe.memory.in_place
            elif isinstance(module, ByProducts):
                module.by_products = recipe.memory.channels_last
            elif isinstance(module, Map):
                module.memory_format = layout


def freeze(recipe: Recipe, discriminator: Network) -> None:
    """Keeps the first blocks as they are, running statistics too, if the recipe says so.

    Raises:
        UserError: there is nothing to start from, or nothing would be left to train.
    """
    training = recipe.training
    blocks = [block for block in discriminator.blocks if any(p.requires_grad for p in block.parameters())]
    if training.freeze_d >= len(blocks):
        raise UserError(f"--freeze-d {training.freeze_d} leaves nothing to train: D has {len(blocks)} blocks that learn.")
    if training.freeze_d and not training.init_from:
        raise UserError("--freeze-d is for fine-tuning: name the run to start from with --init-from.")
    for block in blocks[: training.freeze_d]:
        block.requires_grad_(False).eval()


def optimizers(recipe: Recipe, generator: Network, discriminator: Network, device: torch.device) -> tuple[FrugalAdam, FrugalAdam]:
    """Of the generator and of the discriminator, whose frozen blocks have none."""
    options, memory = recipe.optimizer, recipe.memory
    offload = memory.offload_state == "yes" and device.type != "cpu"
    betas = (options.beta1, options.beta2)
    kind: type[FrugalAdam] = LowBitAdam if memory.moments == "8bit" else FrugalAdam
    made = partial(kind, betas=betas, lean=memory.lean_adam, offload=offload)
    learning = [p for p in discriminator.parameters() if p.requires_grad]
    return made(generator.parameters(), options.lr_g), made(learning, options.lr_d)


def average(recipe: Recipe, generator: Network, device: torch.device) -> Ema | None:
    """The averaged generator, if there is one."""
    half_life = recipe.training.ema_half_life
    host = torch.device("cpu") if recipe.memory.offload_state == "yes" and device.type not in ("cpu", "meta") else None
    return Ema(generator, half_life, host).eval() if half_life else None


def unmade(recipe: Recipe) -> tuple[Network, Network]:
    """Generator and discriminator of ``recipe`` (resolved), as they learn, on torch's device ``meta``: they take no memory."""
    channels, size, _ = recipe.data.shape
    with torch.device("meta"), _Unwritten():
        generator, discriminator = build(recipe.network, size, channels, classes=len(recipe.classes))
    freeze(recipe, discriminator)
    return generator, discriminator


class _Unwritten(TorchFunctionMode):
    """While open, nothing is written in place: where tensors have no memory, torch would import its compiler for that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        name = func.__name__
        if name.endswith("_") and not name.endswith("__") and func is not Tensor.requires_grad_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


def least_held(recipe: Recipe, device: torch.device) -> dict[str, int]:
    """Bytes that every training of ``recipe`` (resolved) comes to hold on ``device``, counted before anything takes memory.

    Returns:
        ``G`` and ``D``: weights with moments and average; ``gradients``: of the one that has more. Moments in 8 bits are left out.
    """
    memory, networks = recipe.memory, dict(zip("GD", unmade(recipe), strict=True))
    found = {name: _bytes([*network.parameters(), *network.buffers()]) for name, network in networks.items()}
    gradients = {name: _bytes(p for p in network.parameters() if p.requires_grad) for name, network in networks.items()}
    if memory.offload_state != "yes" or device.type == "cpu":
        found["G"] *= 2 if recipe.training.ema_half_life else 1
        moments = len(moments_of(recipe.optimizer.beta1, memory.lean_adam)) if memory.moments == "fp32" else 0
        found = {name: bytes_ + moments * gradients[name] for name, bytes_ in found.items()}
    return found | {"gradients": max(gradients.values())}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def make_step(recipe: Recipe, generator: Network, discriminator: Network) -> Step:
    """The step of ``recipe`` on these networks.

    Raises:
        UserError: generated images shall have classes of their own, and the loss compares them with real ones.
    """
    balanced = recipe.training.class_sampling == "balanced"
    memory = recipe.memory
    device = next(generator.parameters()).device
    step = Step(
        generator, discriminator, recipe.objective, recipe.network.latent_dim, Draws(recipe.training.seed, device),
        flip=recipe.data.flip != "no", augment=augment(recipe.augmentation), precision=memory.precision,
        channels_last=memory.channels_last, conditional=bool(recipe.classes), balanced=recipe.classes.present if balanced else (),
        reuse_fakes=recipe.training.reuse_fakes, four_passes=memory.penalty != "double-backward",
    )  # fmt: skip
    if balanced and not recipe.classes:
        raise UserError("--class-sampling balanced is for classes: --conditional learns them.")
    if balanced and step.loss.paired:
        raise UserError(
            f"--class-sampling balanced draws classes anew for generated images, and {recipe.objective.kind} compares each with a "
            "real one, which must be of the same class: use natural, or another --objective."
        )
    return step


def adaptation(recipe: Recipe, step: Step) -> Adaptive | None:
    """What finds how often ``step`` augments, if that is not the same all the time."""
    return adaptive(recipe.augmentation, step.augment, recipe.training.batch_size, step.loss.centred)


@dataclass(frozen=True)
class Phase:
    """What one network does in an update.

    Args:
        name: D or G, in plans, logs and messages.
        network: the one that learns.
        optimizer: of its parameters.
        compute: adds its gradients for a batch, see `Step.discriminator_phase`.
        every: in how many updates it has its turn once.
    """

    name: str
    network: Network
    optimizer: FrugalAdam
    compute: Callable[[Batch, int, Layout], Terms]
    every: int = 1

    @property
    def levers(self) -> Levers:
        """The levers that it has."""
        return of_phase(self.name)


def phases(step: Step, optimizer_g: FrugalAdam, optimizer_d: FrugalAdam, every: int = 1) -> dict[str, Phase]:
    """The phases of an update by their names, in their order (`frugan.gan.levers.PHASES`); G's is due once in ``every`` updates."""
    made = (
        Phase("D", step.discriminator, optimizer_d, step.discriminator_phase),
        Phase("G", step.generator, optimizer_g, step.generator_phase, every),
    )
    return {phase.name: phase for phase in made}
