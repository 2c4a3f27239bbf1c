"""Networks: one file and one dataclass (`frugan.recipe.Network`) for each kind."""

from collections.abc import Callable
from typing import Any

import torch

from frugan import recipe
from frugan.draws import derive
from frugan.networks import dcgan, mlp, r3, upsample
from frugan.networks.blocks import Network

Builder = Callable[[Any, int, int], tuple[Network, Network]]

BUILDERS: dict[type[recipe.Network], Builder] = {
    recipe.Mlp: mlp.build,
    recipe.Upsample: upsample.build,
    recipe.Dcgan: dcgan.build,
    recipe.R3: r3.build,
}


def build(network: recipe.Network, image_size: int, channels: int, seed: int = 0) -> tuple[Network, Network]:
    """Generator and discriminator for images ``[n, channels, image_size, image_size]``, initialised from ``seed``.

    Raises:
        UserError: widths or depths that do not go together, or do not fit the image size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return BUILDERS[type(network)](network, image_size, channels)


__all__ = ["BUILDERS", "Network", "build"]
