"""The plan of what a person asks for, and nothing else, on devices of which nobody knows what a training takes: XLA's."""

import torch

from frugan.config.recipe import Recipe
from frugan.gan import networks
from frugan.gan.levers import PHASES, parts_of, variants
from frugan.memory.layout import Layout
from frugan.memory.plan import Plan
from frugan.utils.errors import UserError


def knows(device: torch.device) -> bool:
    """Whether it can be found out what a training holds on ``device``."""
    return device.type != "xla"


def check_known(device: torch.device) -> None:
    """It must be possible to find out what a training holds on ``device``.

    Raises:
        UserError: it is not.
    """
    if not knows(device):
        raise UserError("what a training holds on XLA is decided by its compiler, and not known before: plan with --device cpu.")


def as_asked(recipe: Recipe, device: torch.device) -> Plan:
    """The plan of what a person asked for, and nothing else, where nobody knows what it takes: on XLA.

    Raises:
        UserError: something cannot be done there, or micro-batches would not all be of one size.
    """
    memory = recipe.memory
    cannot = {
        "--freeze-d": recipe.training.freeze_d > 0,  # torch_xla 2.9: no gradient passes batch norm that takes no statistics
        "--precision fp16": memory.precision == "fp16",  # whose scale the host reads after every update
        "--moments 8bit": memory.moments == "8bit",
        "--offload-state": memory.offload_state == "yes",
        "--offload-activations": memory.offload_activations == "yes",
    }
    for flag, asked in cannot.items():
        if asked:
            raise UserError(f"{flag} cannot be done on {device}: leave it out, or use another --device.")
    channels, size, _ = recipe.data.shape
    made = networks.build(recipe.network, size, channels, classes=len(recipe.classes))
    coupled = made[0].couples_samples, made[1].couples_samples
    batch, layouts = recipe.training.batch_size, {}
    for phase in PHASES:
        parts = parts_of(recipe, phase) or 1
        if batch % parts:
            less = next(n for n in range(parts, 0, -1) if not batch % n)
            more = next(n for n in range(parts, batch + 1) if not batch % n)
            raise UserError(
                f"on {device} micro-batches are all of one size, and a batch of {batch} does not divide into {parts}: "
                f"{less} or {more} parts do."
            )
        layouts[phase] = Layout((batch // parts,) * parts, variants(recipe, phase, device, coupled)[0])
    guarantee = max(layout.guarantee(any(coupled)) for layout in layouts.values())
    return Plan(layouts, "return", 0, False, 0, 0, {}, 0, guarantee)
