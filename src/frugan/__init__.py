"""frugan: trains GANs in the memory you have.

>>> import frugan
>>> run = frugan.train("photos/", recipe="dcgan", epochs=5, image_size=64)
>>> images = frugan.load(run).generate(16, seed=7)  # uint8 [16, channels, 64, 64]
"""

from frugan.config.recipe import Recipe
from frugan.config.run import Run
from frugan.training import load, train
from frugan.utils.errors import UserError

__all__ = ["Recipe", "Run", "UserError", "load", "train"]
__version__ = "0.1.0"
