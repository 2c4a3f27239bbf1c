"""Distances between sets of features: closed forms, slow twins, torch-fidelity; and nothing depends on how samples are cut."""

import gc
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from frugan.evaluation.distances import InceptionScore, Moments, class_coverage, frechet, kid, precision_recall
from frugan.evaluation.families import patches
from frugan.evaluation.families.patches import Patches, pyramid, swd
from frugan.evaluation.features import Features
from frugan.utils.draws import Draws, derive
from frugan.utils.errors import UserError

cuts = st.lists(st.integers(1, 40), min_size=1, max_size=8)  # sizes of batches, over and over


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another take ten times as long on a machine that has other work to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(n: int, d: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    """Correlated features, the later ones larger: float32 [n, d]."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99)) * torch.linspace(0.2, 2, d)
    return torch.randn(n, d, generator=random) @ mix + mean


def cut(rows: Tensor, sizes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    begin, i = 0, 0
    while begin < len(rows):
        yield begin, rows[begin : begin + sizes[i % len(sizes)]]
        begin, i = begin + sizes[i % len(sizes)], i + 1


def moments(*pieces: Tensor) -> Moments:
    found = Moments()
    for piece in pieces:
        found.add(piece)
    return found


def gaussian(mean: Sequence[float] | Tensor, covariance: Tensor) -> Moments:
    tensors = {"count": torch.tensor(11), "mean": torch.as_tensor(mean).double(), "scatter": covariance.double() * 10}
    return Moments.from_dict(tensors)


# Moments and the Frechet distance


@settings(max_examples=15)
@given(sizes=cuts, mean=st.sampled_from([0.0, 3.0, 1e4]), order=st.permutations(range(30)))
def test_moments_know_neither_batches_nor_order(sizes: list[int], mean: float, order: list[int]) -> None:
    x = drawn(30, 5, mean=mean)
    whole, pieces = moments(x), moments(*(piece for _, piece in cut(x[order], sizes)))
    torch.testing.assert_close(whole.mean, torch.from_numpy(x.double().numpy().mean(0)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.covariance, torch.from_numpy(np.cov(x.double().numpy().T)), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(pieces.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pieces.covariance, whole.covariance, rtol=1e-11, atol=1e-9 if mean > 100 else 1e-12)
    merged = moments(x[:11])
    merged.merge(moments(x[11:]))
    merged.merge(Moments())
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-11, atol=1e-9 if mean > 100 else 1e-12)


def test_moments_survive_being_kept() -> None:
    x = drawn(40, 6)
    kept = Moments.from_dict(moments(x[:20]).as_dict())
    kept.add(x[20:])
    whole = moments(x[:20], x[20:])
    assert kept.count == 40 and torch.equal(kept.mean, whole.mean) and torch.equal(kept.covariance, whole.covariance)


def test_moments_of_nothing_or_of_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two samples; there are 1"):
        frechet(moments(drawn(1, 3)), moments(drawn(5, 3)))
    with pytest.raises(ValueError, match="not finite"):
        moments(torch.tensor([[1.0, torch.nan]]))


deviations = st.just(0.0) | st.floats(1e-3, 50)


@given(
    deviations=st.lists(st.tuples(deviations, deviations), min_size=1, max_size=6),
    shift=st.floats(-20, 20),
)
def test_frechet_of_diagonal_covariances_is_the_closed_form(deviations: list[tuple[float, float]], shift: float) -> None:
    a, b = torch.tensor(deviations, dtype=torch.float64).T
    zeros = torch.zeros(len(a))
    expected = len(a) * shift**2 + float((a - b).square().sum())
    got = frechet(gaussian(zeros, a.square().diag()), gaussian(zeros.double() + shift, b.square().diag()))
    assert math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_of_any_covariances_is_that_of_scipy_and_torch_fidelity(seed: int) -> None:
    x, y = drawn(100, 12, seed), drawn(90, 12, seed + 10, 0.3) @ drawn(12, 12, 5)
    c, d = np.cov(x.double().numpy().T), np.cov(y.double().numpy().T)
    delta = x.double().mean(0) - y.double().mean(0)
    expected = float(delta @ delta) + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    got = frechet(moments(x), moments(y))
    assert math.isclose(got, expected, rel_tol=1e-6)
    statistics = [fid_features_to_statistics(z.double()) for z in (x, y)]
    assert math.isclose(got, fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"], rel_tol=1e-6)
    assert math.isclose(got, frechet(moments(y), moments(x)), rel_tol=1e-9)


@settings(max_examples=8)
@given(sizes=cuts, n=st.sampled_from([5, 20, 200]), mean=st.sampled_from([0.0, 30.0]))
def test_frechet_of_a_set_from_itself_is_nothing(sizes: list[int], n: int, mean: float) -> None:
    x = drawn(n, 40, mean=mean)
    assert 0 <= frechet(moments(x), moments(x)) <= 1e-9
    assert 0 <= frechet(moments(x), moments(*(piece for _, piece in cut(x.flip(0), sizes)))) <= 1e-7


def test_frechet_with_fewer_samples_than_features() -> None:
    d, rank = 200, 7
    basis = torch.linalg.qr(drawn(d, d).double()).Q[:, :rank]
    a, b = torch.linspace(1, 40, rank).double(), torch.linspace(30, 2, rank).double()
    one, other = ((basis * values) @ basis.T for values in (a, b))
    assert math.isclose(
        frechet(gaussian([0.0] * d, one), gaussian([0.0] * d, other)), (a.sqrt() - b.sqrt()).square().sum(), rel_tol=1e-9
    )
    still = moments(torch.ones(10, 4))
    assert frechet(still, still) == 0
    assert math.isclose(frechet(still, moments(torch.ones(10, 4) * 2)), 4)


# Features


@settings(max_examples=15)
@given(sizes=cuts, indices=st.lists(st.integers(0, 49), max_size=60), bounds=st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_features_on_disk_are_those_in_memory(sizes: list[int], indices: list[int], bounds: tuple[int, int]) -> None:
    x = drawn(50, 7)
    stored = Features()
    for _, piece in cut(x, sizes):
        stored.add(piece)
    assert len(stored) == 50
    assert torch.equal(stored[:], x)
    assert torch.equal(stored[bounds[0] : bounds[1]], x[bounds[0] : bounds[1]])
    assert torch.equal(stored[torch.tensor(indices, dtype=torch.int64)], x[indices])


def test_features_in_any_order_and_their_errors(tmp_path: Path) -> None:
    x, stored = drawn(50, 7), Features(tmp_path)
    assert len(stored) == 0 and len(stored[:]) == 0
    stored.put(30, x[30:])
    stored.put(0, x[:30])
    stored.add(x[:0])
    assert torch.equal(stored.read(0, 50), x)
    with pytest.raises(ValueError, match=r"shape \(2, 8\)"):
        stored.add(torch.zeros(2, 8))
    with pytest.raises(IndexError):
        stored.rows(torch.tensor([50]))
    with pytest.raises(UserError, match=r"cannot keep features in .*nowhere: No such file"):
        Features(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
    stored.close()
    del stored
    gc.collect()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("r+b", buffering=0) as full:
        monkeypatch.setattr("frugan.evaluation.features.tempfile.TemporaryFile", lambda **_: full)
        with pytest.raises(UserError, match="No space left on device"):
            Features().add(torch.zeros(2, 2))


# KID


def stored(x: Tensor) -> Features:
    features = Features()
    features.add(x)
    return features


def test_kid_is_that_of_its_definition_and_of_torch_fidelity() -> None:
    x, y = drawn(60, 16, 1), drawn(50, 16, 2, 0.4)
    options = {"kid_subsets": 7, "kid_subset_size": 20, "rng_seed": 5, "verbose": False}
    theirs = kid_features_to_metric(x.double(), y.double(), **options)
    for a, b in ((x, y), (stored(x), stored(y))):
        mean, deviation = kid(a, b, subsets=7, subset_size=20, seed=5)
        assert math.isclose(mean, theirs["kernel_inception_distance_mean"], rel_tol=1e-9)
        assert math.isclose(deviation, theirs["kernel_inception_distance_std"], rel_tol=1e-9)
    small, other = x[:5].double(), y[:5].double()

    def kernel(p: Tensor, q: Tensor) -> float:
        return (float(p @ q) / 16 + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (small, other) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(kernel(p, q) for p in small for q in other) / 25
    mean, deviation = kid(small, other, subsets=3)  # all of both in every subset
    assert math.isclose(mean, within - 2 * between, rel_tol=1e-9) and deviation < 1e-9


@settings(max_examples=5)
@given(order=st.permutations(range(25)))
def test_kid_of_whole_sets_knows_no_order(order: list[int]) -> None:
    x, y = drawn(25, 8, 1), drawn(25, 8, 2, 0.4)
    assert math.isclose(kid(x, y, subsets=2)[0], kid(x[order], y, subsets=2)[0], rel_tol=1e-9)


def test_kid_needs_samples() -> None:
    with pytest.raises(ValueError, match="at least two samples of each set; there are 5 and 1"):
        kid(drawn(5, 3), drawn(1, 3))


# Inception score


@settings(max_examples=10)
@given(sizes=cuts, n=st.sampled_from([10, 37, 100]), splits=st.sampled_from([1, 3, 10]), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_inception_score_is_torch_fidelitys_however_samples_are_cut(sizes: list[int], n: int, splits: int, scale: float) -> None:
    logits = drawn(n, 6, 3) * scale
    score = InceptionScore(n, splits)
    for _, piece in cut(logits, sizes):
        score.add(piece)
    theirs = isc_features_to_metric(logits, splits, shuffle=False)
    assert math.isclose(score.result()[0], theirs["inception_score_mean"], rel_tol=1e-9)
    assert math.isclose(score.result()[1], theirs["inception_score_std"], rel_tol=1e-6, abs_tol=1e-7)


def test_inception_score_of_certain_classes() -> None:
    score = InceptionScore(8, splits=2)
    score.add(torch.eye(4).repeat(2, 1).log())  # probabilities of 0 and 1
    assert math.isclose(score.result()[0], 4) and score.result()[1] == 0
    with pytest.raises(ValueError, match="8 samples were announced, and more"):
        score.add(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="8 samples were announced, and 0"):
        InceptionScore(8).result()
    few = InceptionScore(3)
    few.add(torch.randn(3, 5))
    assert few.result() == (1, 0)


# Precision and recall


def naive_precision_recall(real: list[list[int]], fake: list[list[int]], k: int) -> tuple[float, float]:
    """By the definition, in whole numbers."""

    def squared(p: list[int], q: list[int]) -> int:
        return sum((a - b) ** 2 for a, b in zip(p, q, strict=True))

    def within(samples: list[list[int]], others: list[list[int]]) -> float:
        radii = [sorted(squared(p, q) for j, q in enumerate(others) if j != i)[k - 1] for i, p in enumerate(others)]
        return sum(any(squared(p, q) <= r for q, r in zip(others, radii, strict=True)) for p in samples) / len(samples)

    return within(fake, real), within(real, fake)


points = st.lists(st.lists(st.integers(-2, 3), min_size=2, max_size=2), min_size=4, max_size=14)  # many duplicates and ties


@settings(max_examples=60)
@given(real=points, fake=points, k=st.integers(1, 3), chunk=st.integers(1, 16), scale=st.sampled_from([1.0, 0.1, 1e4 / 3]))
def test_precision_and_recall_with_ties(real: list[list[int]], fake: list[list[int]], k: int, chunk: int, scale: float) -> None:
    x, y = torch.tensor(real).double() * scale + 0.7, torch.tensor(fake).double() * scale + 0.7  # ties, but for rounding
    assert precision_recall(x, y, k=k, chunk=chunk) == pytest.approx(naive_precision_recall(real, fake, k), rel=1e-12)


@pytest.mark.parametrize("chunk", [7, 64, 1024])
def test_precision_and_recall_are_torch_fidelitys(chunk: int) -> None:
    real, fake = drawn(150, 6, 1), drawn(130, 6, 2, 1.0) * 0.9
    theirs = prc_features_to_metric(fake.double(), real.double(), verbose=False)
    for a, b in ((real, fake), (stored(real), stored(fake)), (real[torch.randperm(150)], fake.flip(0))):
        precision, recall = precision_recall(a, b, chunk=chunk)
        assert 0.05 < precision < 0.95 and 0.05 < recall < 0.95 and precision != recall
        assert math.isclose(precision, theirs["precision"], rel_tol=1e-6) and math.isclose(recall, theirs["recall"], rel_tol=1e-6)
    assert precision_recall(real, real, chunk=chunk) == (1, 1)
    assert precision_recall(real, fake + 1e4, chunk=chunk) == (0, 0)
    with pytest.raises(ValueError, match="with 3 neighbours need more than 3 samples of each set; there are 3"):
        precision_recall(real, fake[:3])


# Classes


def test_class_coverage() -> None:
    real, fake = torch.tensor([50, 30, 20, 0]), torch.tensor([70, 29, 1, 0])
    kl, covered = class_coverage(fake, real)
    assert math.isclose(kl, 0.7 * math.log(0.7 / 0.5) + 0.29 * math.log(0.29 / 0.3) + 0.01 * math.log(0.01 / 0.2))
    assert covered == 2
    assert class_coverage(real, real * 3) == (0, 3)
    assert class_coverage(torch.tensor([1, 0]), torch.tensor([1, 1])) == (math.log(2), 1)
    kl, covered = class_coverage(torch.tensor([5, 5]), torch.tensor([9, 0]))
    assert math.isclose(kl, 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)) and covered == 1
    assert class_coverage(torch.tensor([90, 2, 8]), torch.tensor([80, 20, 0]))[1] == 2  # exactly a tenth of its share
    with pytest.raises(ValueError, match="at least one sample"):
        class_coverage(torch.tensor([0, 0]), real[:2])


# Sliced Wasserstein distance


def scenes(n: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Smooth shapes with some grain: uint8 [n, c, size, size]."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.uniform(0, 255, (n, channels, 6, 6)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    grain = torch.from_numpy(random.normal(0, 12, smooth.shape).astype(np.float32))
    return (smooth + grain).clamp(0, 255).round().to(torch.uint8)


def patched(images: Tensor, sizes: Sequence[int] = (64,), seed: int = 0, descriptors: int = 600) -> Patches:
    found = Patches(images.shape[-1], images.shape[1], len(images), seed, descriptors=descriptors)
    for first, piece in cut(images, sizes):
        found.add(first, piece)
    return found


@settings(max_examples=6)
@given(sizes=cuts, size=st.sampled_from([8, 16, 23, 32, 45]), channels=st.sampled_from([1, 3]))
def test_patches_know_no_batches(sizes: list[int], size: int, channels: int) -> None:
    images = scenes(30, size, channels)
    whole, pieces = patched(images), patched(images, sizes)
    for level in whole.levels:
        assert torch.equal(whole.levels[level][:], pieces.levels[level][:])
    assert swd(whole, pieces, directions=8) == dict.fromkeys(whole.levels, 0.0)
    backwards = Patches(size, channels, 30, descriptors=600)
    for first in range(29, -1, -1):
        backwards.add(first, images[first : first + 1])
    assert swd(whole, backwards, directions=8) == dict.fromkeys(whole.levels, 0.0)


@pytest.mark.parametrize(("size", "levels"), [(8, [8]), (15, [15]), (16, [16]), (28, [16]), (32, [32, 16]), (100, [64, 32, 16])])
def test_levels_of_a_size(size: int, levels: list[int]) -> None:
    assert list(Patches(size, 1, 1).levels) == levels


def test_an_image_gives_patches_in_proportion() -> None:
    images = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(7, 1, 16, 16)  # each of one value, its number
    numbers = patched(images, descriptors=100).levels[16][:]
    assert (numbers == numbers[:, :1]).all()
    assert set(numbers[:, 0].long().bincount().tolist()) <= {14, 15}
    few = patched(images, descriptors=3).levels[16][:]  # not all of them
    assert few[:, 0].unique().numel() == 3
    assert not torch.equal(patched(scenes(4, 16), seed=1).levels[16][:], patched(scenes(4, 16), seed=2).levels[16][:])


def test_swd_tells_noise_from_a_slight_blur() -> None:
    images, others = scenes(600, 32, seed=1), scenes(600, 32, seed=2)
    blurred = torch.from_numpy(scipy.ndimage.gaussian_filter(images.float(), (0, 0, 0.7, 0.7))).round().to(torch.uint8)
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, images.shape, np.uint8))
    real = patched(images, descriptors=6000)
    same, fresh, slight, far = (
        swd(real, patched(x, seed=seed, descriptors=6000), directions=64)
        for x, seed in ((images, 0), (others, 1), (blurred, 0), (noise, 0))
    )
    assert set(same.values()) == {0.0}
    assert 0 < fresh[32] < slight[32] < far[32]
    assert 0 < slight[16] < 0.2 * slight[32] and fresh[16] < 0.5 * far[16]  # a blur shows most in the finest level


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 3)])
def test_swd_is_its_slow_twin(size: int, channels: int) -> None:
    sets = scenes(3, size, channels, 1), scenes(5, size, channels, 2)
    levels = [size, 16] if size > 16 else [16]
    blur = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    expected = {}
    for number, level in enumerate(levels):
        directions = torch.randn(10, channels * 49, generator=torch.Generator().manual_seed(derive(0, "directions", level))).numpy()
        columns = []
        for images in sets:
            places = Draws(0).uniform(f"patches/{level}", 0, 40, 2)
            found = []
            for i in range(40):
                owner = next(m for m in range(len(images)) if i < (m + 1) * 40 // len(images))
                image = images[owner].double().numpy()
                bands = []
                for smaller in levels[1:]:
                    small = np.stack([scipy.ndimage.convolve(c, blur, mode="mirror")[::2, ::2] for c in image])
                    spread = np.zeros_like(image)
                    spread[:, ::2, ::2] = small
                    bands.append(image - np.stack([scipy.ndimage.convolve(c, blur * 4, mode="mirror") for c in spread]))
                    image = small
                    assert image.shape[-1] == smaller
                y, x = (int(float(p) * (level - 6)) for p in places[i])
                found.append([*bands, image][number][:, y : y + 7, x : x + 7])
            every = np.stack(found)
            every = (every - every.mean((0, 2, 3), keepdims=True)) / every.std((0, 2, 3), keepdims=True)
            columns.append([sorted(float(np.dot(p.ravel(), w / np.linalg.norm(w))) for p in every) for w in directions])
        expected[level] = 1000 * float(np.abs(np.subtract(*columns)).mean())
    ours = [patched(images, descriptors=40) for images in sets]
    assert swd(*ours, directions=10, chunk=3) == pytest.approx(expected, rel=1e-4)


def test_pyramids_add_up() -> None:
    images = scenes(2, 64).float()
    bands = list(pyramid(images, [64, 32, 16]))
    assert [band.shape[-1] for band in bands] == [64, 32, 16]
    flat = list(pyramid(torch.full((1, 1, 64, 64), 200.0), [64, 32, 16]))
    assert all((band[..., 4:-4, 4:-4] == 0).all() for band in flat[:-1]) and (flat[-1] == 200).all()
    assert all(fine.std() < coarse.std() for fine, coarse in pairwise(bands))


def test_one_colour_all_over_is_no_error() -> None:
    grey = torch.full((4, 3, 16, 16), 9, dtype=torch.uint8)
    assert swd(patched(grey), patched(grey), directions=4) == {16: 0.0}
    assert swd(patched(grey), patched(scenes(4, 16)), directions=4)[16] > 100


def test_what_cannot_be_compared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    images = scenes(4, 16)
    with pytest.raises(ValueError, match="as many patches"):
        swd(patched(images), patched(images, descriptors=500))
    with pytest.raises(ValueError, match="one shape"):
        swd(patched(images), patched(images[:, :1]))
    unfinished = Patches(16, 3, 5, descriptors=600)
    unfinished.add(0, images)
    with pytest.raises(ValueError, match="have not come"):
        swd(patched(images), unfinished)
    with pytest.raises(ValueError, match="number 6 has come"):
        unfinished.add(2, images)
    with pytest.raises(ValueError, match="bytes an image were announced"):
        unfinished.add(4, images[:1].float())
    with pytest.raises(ValueError, match="at least 7 pixels"):
        Patches(6, 1, 5)
    monkeypatch.setattr(patches, "PIECE", 1)  # one image at a time gives the same
    assert swd(patched(images), patched(images), directions=4) == {16: 0.0}
    unfinished.close()
