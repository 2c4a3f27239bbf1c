"""Inception's features, and all metrics on them, are torch-fidelity's; and what is missing is said."""

import hashlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch_fidelity
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from frugan.evaluation.distances import InceptionScore, Moments, frechet, kid, too_few
from frugan.evaluation.families.extractor import DINOV2, INCEPTION_SHA256, Extractor
from frugan.utils.device import arithmetic
from frugan.utils.errors import UserError

N = 6  # images of a set: Inception takes a tenth of a second for each


class Unfilled(FeatureExtractorInceptionV3):
    """The network without its weights."""

    def load_state_dict(self, *_: object, **__: object) -> None:
        pass


def scenes(seed: int) -> Tensor:
    """Smooth images: uint8 [N, 3, 32, 32]."""
    coarse = torch.rand(N, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 255
    return nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another take ten times as long on a machine that has other work to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


def sets() -> tuple[Tensor, Tensor]:
    """Fake and real: one is much darker, so that the rounding of torch-fidelity's distance does not count for 1e-6 of it."""
    return scenes(1), scenes(2) // 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that keep images apart: normalised layer by layer, by the statistics of a few images."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save({}, folder / "none.pth")
    network = Unfilled("inception-v3-compat", ["logits_unbiased"], feature_extractor_weights_path=folder / "none.pth")
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.fc.bias.zero_()
    with torch.inference_mode():
        network.train()(scenes(9)[:3])
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


@pytest.fixture(scope="module")
def extractor(weights: Path) -> Extractor:
    return Extractor(weights=weights, any_weights=True, batch=N)


@pytest.fixture(scope="module")
def features(extractor: Extractor) -> list[dict[str, Tensor]]:
    """Of two sets of images."""
    return [extractor(images) for images in sets()]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and an empty folder of torch hub."""
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub"


def test_fid_and_the_rest_are_torch_fidelitys(features: list[dict[str, Tensor]], weights: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "fake", tmp_path / "real"]
    for folder, images in zip(folders, sets(), strict=True):
        folder.mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), fid=True, isc=True, kid=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights),
        kid_subsets=10, kid_subset_size=4, rng_seed=7, samples_shuffle=False, isc_splits=2,
        batch_size=N, cuda=False, save_cpu_ram=True, cache=False, verbose=False,
    )  # fmt: skip
    fake, real = features
    assert fake["features"].shape == (N, 2048) and fake["logits"].shape == (N, 1008)
    assert (fake["features"].std(0) > 0.01).sum() > 2000

    moments = [Moments(), Moments()]
    for found, some in zip(moments, features, strict=True):
        found.add(some["features"])
    assert math.isclose(frechet(*moments), theirs["frechet_inception_distance"], rel_tol=1e-6)
    a, b = (some["features"].double() for some in features)
    x, y = ((some - some.mean(0)) / (N - 1) ** 0.5 for some in (a, b))
    by_samples = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()  # nowhere rounded as 0 +- eps
    assert math.isclose(frechet(*moments), (a.mean(0) - b.mean(0)).square().sum() + by_samples, rel_tol=1e-11)
    assert frechet(moments[0], moments[0]) <= 1e-9

    mean, deviation = kid(fake["features"], real["features"], subsets=10, subset_size=4, seed=7)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-5)  # they compute in float32

    score = InceptionScore(N, splits=2)
    score.add(fake["logits"])
    assert score.result()[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert score.result()[0] > 1.05


def test_features_of_pieces_and_of_grey_images(extractor: Extractor, features: list[dict[str, Tensor]], weights: Path) -> None:
    images = scenes(1)
    small = Extractor(weights=weights, any_weights=True, batch=2)(images[:3])
    for key, whole in features[0].items():
        torch.testing.assert_close(small[key], whole[:3], rtol=1e-4, atol=1e-4)
        assert small[key].dtype == torch.float32 and not small[key].is_inference()
    grey = images[:1, :1]
    with arithmetic("fp32", torch.device("cpu")):  # as it is while training
        assert torch.equal(extractor(grey)["features"], extractor(images[:1, :1])["features"])
    assert torch.equal(extractor(grey)["features"], extractor(grey.repeat(1, 3, 1, 1))["features"])
    for wrong in (images.float(), images[0], images[:, :2]):
        with pytest.raises(ValueError, match=r"bytes \[n, 3 or 1, h, w\]"):
            extractor(wrong)


def test_other_weights_are_taken_only_on_demand(extractor: Extractor, weights: Path) -> None:
    assert not extractor.official and extractor.width == 2048
    assert extractor.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"does not hold the published weights.*not with 6726825d.*are no FID.*https:"):
        Extractor(weights=weights)
    assert f"-{INCEPTION_SHA256[:8]}.pth" in URL_INCEPTION_V3  # the file that torch-fidelity fetches has this hash


def test_the_published_weights_bear_the_name(
    weights: Path, extractor: Extractor, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = offline / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a download")
    with pytest.raises(UserError, match=r"Remove it, and it is fetched again\."):
        Extractor()
    cached.unlink()
    cached.hardlink_to(weights)
    monkeypatch.setattr("frugan.evaluation.families.extractor.INCEPTION_SHA256", extractor.sha256)
    assert Extractor().official  # found where torch-fidelity puts them
    assert Extractor(weights=weights).official


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


@pytest.mark.parametrize("content", ["nothing", "noise", "half", "other tensors", "a program"])
def test_bad_weights_are_named(content: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.pth"
    match content:
        case "nothing":
            file.touch()
        case "noise":
            file.write_bytes(b"noise" * 100)
        case "half":
            file.write_bytes(weights.read_bytes()[:1_000_000])
        case "other tensors":
            torch.save({"a": torch.zeros(3)}, file)
        case "a program":
            torch.save(Harmful(), file)
    with pytest.raises(UserError, match=r"bad\.pth (cannot be read as weights|does not hold the weights of Inception v3)") as error:
        Extractor(weights=file, any_weights=True)
    assert "\n" not in str(error.value)
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"cannot read the weights .*none\.pth: No such file"):
        Extractor(weights=tmp_path / "none.pth")


def test_without_network_it_says_what_to_get(offline: Path) -> None:
    with pytest.raises(UserError, match="cannot be downloaded") as error:
        Extractor()
    said = str(error.value)
    assert URL_INCEPTION_V3 in said and str(offline / "checkpoints") in said and "--weights" in said and "swd" in said
    assert not list((offline / "checkpoints").iterdir())
    with pytest.raises(UserError, match=r"DINOv2 cannot be fetched \(.*dinov2_vitb14 of facebookresearch/dinov2.*swd"):
        Extractor(DINOV2)


@pytest.mark.usefixtures("offline")
def test_without_torch_fidelity_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in ("inception-v3-compat", DINOV2):
        with pytest.raises(UserError, match=r"pip install frugan\[metrics\].*swd"):
            Extractor(name)
    with pytest.raises(UserError, match="did you mean 'dinov2-vit-b-14'"):
        Extractor("dinov2-vit-b")


STAND_IN = """
import torch

class Network(torch.nn.Module):
    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return x.flatten(1)[:, :768]

def dinov2_vitb14():
    return Network()
"""


def test_dinov2_is_taken_from_torch_hub(offline: Path) -> None:
    folder = offline / "facebookresearch_dinov2_main"
    folder.mkdir(parents=True)
    (folder / "hubconf.py").write_text(STAND_IN)
    extractor = Extractor(DINOV2)
    found = extractor(scenes(1)[:3, :1])
    assert found.keys() == {"features"}
    assert found["features"].shape == (3, extractor.width) and found["features"].std() > 0.1
    with pytest.raises(UserError, match="no file of weights for DINOv2"):
        Extractor(DINOV2, weights=folder / "x.pth")


def test_too_few_samples_are_remarked_upon() -> None:
    assert too_few(50_000, 2048) is None
    said = too_few(1000, 2048)
    assert said and said.startswith("1,000 images are few for a Frechet distance on 2,048 features")
