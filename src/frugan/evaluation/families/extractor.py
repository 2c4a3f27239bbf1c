"""Features of images from the networks of torch-fidelity: Inception v3 as FID is defined on it, and DINOv2.

torch-fidelity is an extra (``pip install frugan[metrics]``), imported when an `Extractor` is made. Importing it takes torchvision
along, about 160 MiB.
"""

import hashlib
import importlib
import pickle
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugan.evaluation.families.base import Task
from frugan.evaluation.families.vectors import VectorFamily
from frugan.utils.device import arithmetic
from frugan.utils.errors import UserError, nearest

INCEPTION = "inception-v3-compat"
DINOV2 = "dinov2-vit-b-14"

# What torch-fidelity calls the layers that are wanted of each network, by what they are here, and how wide the features are.
LAYERS = {
    INCEPTION: {"features": "2048", "logits": "logits_unbiased"},
    DINOV2: {"features": "dinov2"},
}
WIDTHS = {INCEPTION: 2048, DINOV2: 768}

# Of weights-inception-2015-12-05-6726825d.pth, 95,628,359 bytes: the same file as pytorch-fid's.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

OFFLINE = "What works without: swd for any images, and the metrics by a classifier for images with classes."


class Extractor:
    """A network that turns images into features.

    Inception's weights are fetched once, as torch-fidelity fetches them, into torch hub's folder. They are a pickle: before
    torch-fidelity loads it, it is compared with the published SHA-256 and read by torch's unpickler of weights alone, which
    refuses what is anything but tensors. DINOv2 is code and weights that torch hub fetches from facebookresearch/dinov2 on GitHub
    and runs unchecked: ask for it only if you trust them.

    Args:
        name: `INCEPTION` or `DINOV2`.
        weights: a file of Inception's weights, instead of the download.
        any_weights: also take weights that are not the published ones; what is computed with them must say so.
        device: where the network runs.
        batch: images at once. On a CPU more are no faster: 4 take some 80 MiB besides Inception, 16 take 500.

    Attributes:
        width: of the features.
        official: whether distances on these features may bear the names that papers use. DINOv2's weights are taken as fetched.
        sha256: of the file of weights, hexadecimal; None for DINOv2.

    Raises:
        UserError: torch-fidelity is missing, or the weights are: with where to get them.
    """

    def __init__(
        self,
        name: str = INCEPTION,
        *,
        weights: Path | None = None,
        any_weights: bool = False,
        device: torch.device | str = "cpu",
        batch: int = 4,
    ) -> None:
        if name not in LAYERS:
            raise UserError(f"there is no feature extractor {name!r}: {nearest(name, LAYERS)}")
        self.name = name
        self.width = WIDTHS[name]
        self.official = True
        self.sha256: str | None = None
        self._batch = batch
        self._device = torch.device(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch-fidelity's own, and what it is to change in the filters
            self._network = (self._dinov2(weights) if name == DINOV2 else self._inception(weights, any_weights)).to(self._device)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 ``[n, 3 or 1, h, w]`` of any size, on the CPU: they are resized as TensorFlow 1 does.

        Returns:
            float32 on the CPU: ``features`` ``[n, width]``, and from Inception ``logits`` ``[n, 1008]`` without bias.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"features are taken of bytes [n, 3 or 1, h, w], not of {images.dtype} {tuple(images.shape)}.")
        pieces = []
        for piece in torch.split(images, self._batch):
            # Also on a GPU that would rather compute convolutions in TF32: the numbers are compared with those of other machines.
            with torch.inference_mode(), arithmetic("fp32", self._device):
                outputs = self._network(piece.to(self._device).expand(-1, 3, -1, -1))
                pieces.append([output.to("cpu", torch.float32) for output in outputs])
        return {key: torch.cat(layer) for key, layer in zip(LAYERS[self.name], zip(*pieces, strict=True), strict=True)}

    def _inception(self, weights: Path | None, any_weights: bool) -> Any:
        network = _torch_fidelity("feature_extractor_inceptionv3")
        file = weights or _fetched(network.URL_INCEPTION_V3)
        self.sha256 = _sha256(file)
        self.official = self.sha256 == INCEPTION_SHA256
        if not self.official and not any_weights:
            raise UserError(
                f"{file} does not hold the published weights: its SHA-256 begins with {self.sha256[:8]}, not with "
                f"{INCEPTION_SHA256[:8]}, and distances by others are no FID. "
                + (f"Get {network.URL_INCEPTION_V3}." if weights else "Remove it, and it is fetched again.")
            )
        with _unfit(file):
            torch.load(file, map_location="cpu", weights_only=True)
            return network.FeatureExtractorInceptionV3(
                self.name, list(LAYERS[self.name].values()), feature_extractor_weights_path=str(file)
            )

    def _dinov2(self, weights: Path | None) -> Any:
        network = _torch_fidelity("feature_extractor_dinov2")
        if weights is not None:
            raise UserError("torch-fidelity takes no file of weights for DINOv2, only for Inception.")
        try:
            return network.FeatureExtractorDinoV2(self.name, list(LAYERS[self.name].values()))
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(
                f"DINOv2 cannot be fetched ({_first_line(error)}). Let torch hub load {network.MODEL_METADATA[self.name]} of "
                f"facebookresearch/dinov2 where there is a connection, and copy its folder to {torch.hub.get_dir()}. {OFFLINE}"
            ) from None


class ExtractorFamily(VectorFamily):
    """Features of an `Extractor`."""

    def __init__(self, task: Task, network: Extractor) -> None:
        super().__init__(task)
        self.network = network
        self.width = network.width

    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `VectorFamily` says: with Inception's logits."""
        outputs = self.network(images)
        return outputs["features"], outputs.get("logits")

    def key(self) -> list[str]:
        """Its name, and the SHA-256 of its weights."""
        return [self.network.name, str(self.network.sha256)]

    def needs(self) -> int:
        """As `Family` says."""
        return 400 << 20


def _torch_fidelity(module: str) -> Any:
    try:
        importlib.import_module("torch_fidelity")
        return importlib.import_module(f"torch_fidelity.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch_fidelity":
            raise
        raise UserError(f"this needs torch-fidelity: pip install frugan[metrics]. {OFFLINE}") from None


def _fetched(url: str) -> Path:
    """The file of ``url`` in torch hub's folder, where torch-fidelity looks for it too."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), INCEPTION_SHA256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(
                f"Inception's weights cannot be downloaded ({_first_line(error)}). Get {url} some other way, and put it at "
                f"{file} or name it with --weights. {OFFLINE}"
            ) from None
    return file


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the weights {file}: {error.strerror or error}.") from None


@contextmanager
def _unfit(file: Path) -> Iterator[None]:
    try:
        yield
    except (pickle.UnpicklingError, EOFError):
        raise UserError(f"{file} cannot be read as weights alone: it is damaged, or holds more than tensors.") from None
    except (RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{file} does not hold the weights of Inception v3 ({_first_line(error)}).") from None


def _first_line(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error).strip().partition("\n")[0].rstrip(".:")
