"""Networks: for each kind of `frugan.config.architectures.Architecture` a file of its name here, with a function ``build``."""

from importlib import import_module

import torch

from frugan.config.architectures import Architecture
from frugan.gan.networks.blocks import Network
from frugan.utils.draws import derive


def build(network: Architecture, image_size: int, channels: int, seed: int = 0) -> tuple[Network, Network]:
    """Generator and discriminator for images ``[n, channels, image_size, image_size]``, initialised from ``seed``.

    Raises:
        UserError: widths or depths that do not go together, or do not fit the image size.
    """
    builder = import_module(f"frugan.gan.networks.{network.kind.replace('-', '_')}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        made: tuple[Network, Network] = builder.build(network, image_size, channels)
        return made


__all__ = ["Network", "build"]
