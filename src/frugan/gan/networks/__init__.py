"""Networks: one file and one dataclass (`frugan.config.architectures.Architecture`) for each kind."""

from collections.abc import Callable
from typing import Any

import torch

from frugan.config.architectures import R3, Architecture, Dcgan, Mlp, Upsample
from frugan.gan.networks import dcgan, mlp, r3, upsample
from frugan.gan.networks.blocks import Network
from frugan.utils.draws import derive

Builder = Callable[[Any, int, int], tuple[Network, Network]]

BUILDERS: dict[type[Architecture], Builder] = {
    Mlp: mlp.build,
    Upsample: upsample.build,
    Dcgan: dcgan.build,
    R3: r3.build,
}


def build(network: Architecture, image_size: int, channels: int, seed: int = 0) -> tuple[Network, Network]:
    """Generator and discriminator for images ``[n, channels, image_size, image_size]``, initialised from ``seed``.

    Raises:
        UserError: widths or depths that do not go together, or do not fit the image size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return BUILDERS[type(network)](network, image_size, channels)


__all__ = ["BUILDERS", "Network", "build"]
