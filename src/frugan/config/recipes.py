"""The named recipes: one plain function each. Add a recipe by adding a function here and its name to `RECIPES`."""

from pathlib import Path

from frugan.config.architectures import R3, Dcgan, Mlp, Projected, Upsample
from frugan.config.augmentation import Augmentation
from frugan.config.greys import grey_size
from frugan.config.objectives import Bce, RpGan
from frugan.config.recipe import Data, Memory, Optimizer, Recipe, Training, read
from frugan.utils.errors import UserError, nearest


def mlp() -> Recipe:
    """Dense discriminator against a generator of transposed convolutions: the memory-optimised Fashion-MNIST GAN."""
    return Recipe(
        recipe="mlp",
        network=Mlp(),
        objective=Bce(label_smoothing=0.1),
        optimizer=Optimizer(lr_g=2e-4, lr_d=2e-4),
        training=Training(reuse_fakes=True),
    )


def upsample() -> Recipe:
    """Nearest upsampling and convolution from 256 numbers, dropout in D, equal rates: the speed-optimised Fashion-MNIST DCGAN."""
    return Recipe(
        recipe="upsample",
        network=Upsample(),
        objective=Bce(label_smoothing=0.1),
        optimizer=Optimizer(lr_g=2e-4, lr_d=2e-4),
        training=Training(reuse_fakes=True),
    )


def dcgan() -> Recipe:
    """DCGAN for any image size (Radford et al. 2015, arXiv 1511.06434), with label smoothing and an averaged generator."""
    return Recipe(
        recipe="dcgan",
        network=Dcgan(),
        objective=Bce(label_smoothing=0.1),
        optimizer=Optimizer(lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999),
        training=Training(reuse_fakes=True),
    )


def resize() -> Recipe:
    """DCGAN by resize-convolutions (Odena et al. 2016) at high rates that fall to 0: photographs and drawings in minutes."""
    return Recipe(
        recipe="resize",
        network=Dcgan(upsampling="nearest", width_g=32),
        objective=Bce(label_smoothing=0.1),
        optimizer=Optimizer(lr_g=1e-3, lr_d=1e-3, beta1=0.5, beta2=0.999, schedule="cosine"),
        augmentation=Augmentation(augment="auto"),
        training=Training(batch_size=64, reuse_fakes=True),
        memory=Memory(precision="auto"),
    )


def r3() -> Recipe:
    """R3GAN (Huang et al. 2024, arXiv 2501.05441): relativistic pairing, R1 and R2 on every step, no normalisation."""
    return Recipe(
        recipe="r3",
        network=R3(),
        objective=RpGan(r1=0.5, r2=0.5),
        optimizer=Optimizer(lr_g=2e-4, lr_d=2e-4, beta1=0.0, beta2=0.99),
    )


def projected() -> Recipe:
    """Heads on frozen features that are learnt from the same images in seconds (Sauer et al. 2021, arXiv 2111.01007)."""
    return Recipe(
        recipe="projected",
        network=Projected(width_g=48, modulation=True),
        objective=Bce(label_smoothing=0.1),
        optimizer=Optimizer(lr_g=4e-3, lr_d=4e-3, beta1=0.0, beta2=0.999, schedule="cosine"),
        training=Training(reuse_fakes=True),
        memory=Memory(precision="auto"),
    )


RECIPES = {f.__name__: f for f in (mlp, upsample, dcgan, resize, r3, projected)}
DEFAULT, DEFAULT_GREY = "resize", "projected"  # where none is named, and of labelled grey images of SMALL pixels a side or fewer
SMALL = 32


def default(data: Data) -> str:
    """The recipe for the images that ``data`` names, where none is named (docs/LOG.md says why)."""
    size = grey_size(data)
    return DEFAULT if size is None or size > SMALL else DEFAULT_GREY


def get(name: str) -> Recipe:
    """The recipe called ``name``, or the one in the TOML file ``name``, which may name one of these and say what differs.

    Raises:
        UserError: there is neither (with the nearest name).
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".toml"):
        return read(Path(name), RECIPES)
    raise UserError(f"there is no recipe called {name!r}: {nearest(name, RECIPES)}")
