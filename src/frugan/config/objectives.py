"""The kinds of objectives and their options. Add a loss by adding its dataclass here and its arithmetic to `frugan.gan.losses`."""

from dataclasses import dataclass
from typing import Any, ClassVar

from frugan.config.section import Kinded, option


@dataclass(frozen=True, kw_only=True)
class Objective(Kinded):
    """What both networks minimise; `frugan.gan.losses` and `frugan.gan.penalties` hold the arithmetic."""

    role: ClassVar[str] = "objective"
    kinds: ClassVar[dict[str, type[Any]]] = {}
    r1: float = option(0.0, "weight of half the squared gradient of D at real images", least=0)
    r2: float = option(0.0, "weight of half the squared gradient of D at generated images", least=0)


@dataclass(frozen=True, kw_only=True)
class Bce(Objective):
    """Binary cross entropy, non-saturating (Goodfellow et al. 2014, arXiv 1406.2661)."""

    kind: ClassVar[str] = "bce"
    label_smoothing: float = option(0.0, "how far the target of real images lies below 1 (one-sided)", least=0, most=0.5)


@dataclass(frozen=True, kw_only=True)
class Hinge(Objective):
    """Hinge loss (Lim and Ye 2017, arXiv 1705.02894)."""

    kind: ClassVar[str] = "hinge"


@dataclass(frozen=True, kw_only=True)
class WganGp(Objective):
    """Wasserstein loss with gradient penalty (Gulrajani et al. 2017, arXiv 1704.00028)."""

    kind: ClassVar[str] = "wgan-gp"
    gradient_penalty: float = option(10.0, "weight of the penalty on gradients between real and generated images", least=0)


@dataclass(frozen=True, kw_only=True)
class RpGan(Objective):
    """Relativistic pairing loss (Jolicoeur-Martineau 2018, arXiv 1807.00734; Huang et al. 2024, equation 2)."""

    kind: ClassVar[str] = "rpgan"
