"""Dense discriminator against a generator of transposed convolutions: the memory-optimised Fashion-MNIST GAN.

The original normalises D's layers over the batch (``--norm-d batch``). Real and generated images come in batches of their own, so
that takes away what a dense D tells them apart by, and the generator does not leave its noise (docs/LOG.md): the default is none.
"""

from torch import nn

from frugan.config.architectures import Mlp
from frugan.gan.networks.blocks import Block, Dropout, Head, Network, norm, radford_init
from frugan.gan.networks.generators import transposed_generator


def build(options: Mlp, image_size: int, channels: int) -> tuple[Network, Network]:
    """Both networks; see `frugan.gan.networks.build`."""
    sizes = options.sizes(image_size)
    generator = transposed_generator(options.latent_dim, sizes, options.width_g, channels, options.norm_g, slope=0.2)

    blocks: list[Block] = []
    before = channels * image_size**2
    for i in range(options.layers_d):
        out = max(1, options.width_d // 2**i)
        dense = nn.Linear(before, out, bias=options.norm_d == "none")
        activation = nn.LeakyReLU(0.2, inplace=True)
        flatten = [] if i else [nn.Flatten()]
        drop = Dropout(options.dropout, f"dense{i}")
        blocks.append(Block(*flatten, dense, *norm(options.norm_d, out, flat=True), activation, drop))
        before = out
    blocks.append(Head(nn.Linear(before, 1), nn.Flatten(0)))
    discriminator = Network(*blocks)

    radford_init(generator)  # the dense layers keep torch's own, which is made for them
    return generator, discriminator
