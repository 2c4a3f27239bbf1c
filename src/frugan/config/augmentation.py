"""What D is shown instead of the images themselves."""

from dataclasses import dataclass, replace
from typing import Literal

from frugan.config.section import Section, option

FEW = 10_000  # images below which `auto` augments


@dataclass(frozen=True, kw_only=True)
class Augmentation(Section):
    """What D is shown instead of the images themselves, real and generated alike; `frugan.gan.augment` has the arithmetic."""

    augment: Literal["none", "diff", "ada", "auto"] = option(
        "none", f"augment what D sees; diff: always, ada: the more D overfits, auto: ada below {FEW:,} images, else none"
    )
    augment_policy: str = option("color,translation,cutout", "how D's images are augmented, by names with commas")
    ada_target: float | None = option(
        None, "ada: the value of r_t above which p rises; unset: 0.6, or 0.77 for objectives that compare pairs", above=0, most=1
    )
    ada_images: int = option(50_000, "ada: images in which p can go from 0 to 1", least=1)

    def settled(self, images: int) -> "Augmentation":
        """The same for so many images, without ``auto``."""
        if self.augment != "auto":
            return self
        return replace(self, augment="ada" if images < FEW else "none")
