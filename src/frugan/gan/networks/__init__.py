"""Networks: for each kind of `frugan.config.architectures.Architecture` a file of its name here, with a function ``build``."""

from importlib import import_module

import torch

from frugan.config.architectures import Architecture
from frugan.gan.networks.blocks import ClassNoise, Head, Map, Network
from frugan.gan.networks.convolutions import ByProducts
from frugan.utils.draws import derive
from frugan.utils.errors import UserError


def build(network: Architecture, image_size: int, channels: int, seed: int = 0, classes: int = 0) -> tuple[Network, Network]:
    """Generator and discriminator for images ``[n, channels, image_size, image_size]``, initialised from ``seed``.

    With ``classes``, both need to be told those of their samples; all that a network without has is the same.

    Raises:
        UserError: widths or depths that do not go together, or do not fit the image size; or D has no `Head` to learn classes by.
    """
    builder = import_module(f"frugan.gan.networks.{network.kind.replace('-', '_')}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        made: tuple[Network, Network] = builder.build(network, image_size, channels)
        if classes:
            _condition(*made, network, classes)
        return made


def _condition(generator: Network, discriminator: Network, network: Architecture, classes: int) -> None:
    generator.entry = ClassNoise(classes, network.latent_dim)
    heads = [m for m in discriminator.modules() if isinstance(m, Head)]
    if not heads:
        raise UserError(f"--conditional: the discriminator of {network.kind} has no head that could learn classes.")
    for head in heads:
        head.condition(classes)


__all__ = ["ByProducts", "Map", "Network", "build"]
