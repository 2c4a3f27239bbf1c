"""Augmentation: each operation by a slow twin, its draws, its strength."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from frugan.config.augmentation import FEW, Augmentation
from frugan.gan.augment import INTERVAL, MOST, OPERATIONS, PAIRS, SINGLE, Adaptive, Augment, adaptive
from frugan.utils.draws import Draws, Rows
from frugan.utils.errors import UserError


def color(image: Tensor, u: list[float], p: float) -> Tensor:
    if u[0] < p:
        image = image + (u[3] - 0.5)
    if u[1] < p:
        grey = image.mean(0, keepdim=True)
        image = (image - grey) * (2 * u[4]) + grey
    if u[2] < p:
        image = (image - image.mean()) * (u[5] + 0.5) + image.mean()
    return image


def translation(image: Tensor, u: list[float], p: float) -> Tensor:
    if u[0] >= p:
        return image
    _, h, w = image.shape
    moved = torch.zeros_like(image)
    dy, dx = (int(u[i] * (2 * reach + 1)) - reach for i, reach in ((1, int(h / 8 + 0.5)), (2, int(w / 8 + 0.5))))
    for y in range(h):
        for x in range(w):
            if 0 <= y - dy < h and 0 <= x - dx < w:
                moved[:, y, x] = image[:, y - dy, x - dx]
    return moved


def cutout(image: Tensor, u: list[float], p: float) -> Tensor:
    if u[0] >= p:
        return image
    _, h, w = image.shape
    image = image.clone()
    top, left = (int(u[i] * (n + 1 - int(n / 2 + 0.5) % 2)) - int(n / 2 + 0.5) // 2 for i, n in ((1, h), (2, w)))
    image[:, max(0, top) : max(0, top + int(h / 2 + 0.5)), max(0, left) : max(0, left + int(w / 2 + 0.5))] = 0
    return image


SLOW: dict[str, Callable[[Tensor, list[float], float], Tensor]] = {"color": color, "translation": translation, "cutout": cutout}
assert SLOW.keys() == OPERATIONS.keys(), "write a slow twin of the new operation"


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 11)])
def test_an_operation_does_what_its_slow_twin_does(name: str, shape: tuple[int, ...]) -> None:
    operation = OPERATIONS[name]
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(40, *shape, generator=draw, dtype=torch.float64) * 2 - 1
    u = torch.rand(40, operation.numbers, generator=draw, dtype=torch.float64)
    for p in (1.0, 0.4):
        expected = torch.stack([SLOW[name](image, numbers, p) for image, numbers in zip(images, u.tolist(), strict=True)])
        torch.testing.assert_close(operation.function(images, u, p), expected, rtol=0, atol=1e-12)
    assert torch.equal(operation.function(images, u, 0.0), images)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_flow_twice(name: str) -> None:
    operation = OPERATIONS[name]
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(3, 2, 8, 8, generator=draw, dtype=torch.float64).requires_grad_()
    u = torch.rand(3, operation.numbers, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: operation.function(x, u, 0.8), images)
    assert torch.autograd.gradgradcheck(lambda x: operation.function(x, u, 0.8).square(), images)


def test_draws_belong_to_samples_and_to_what_they_are_used_for() -> None:
    augment, draws = Augment(" color,translation , cutout"), Draws(0)
    images = torch.rand(70, 3, 8, 8) * 2 - 1
    whole = augment(images, Rows(draws, "real", 5, 70))
    parts = [augment(images[a:b], Rows(draws, "real", 5 + a, b - a)) for a, b in ((0, 1), (1, 66), (66, 70))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    assert not torch.equal(augment(images, Rows(draws, "fake", 5, 70)), whole)
    low = images.bfloat16().to(memory_format=torch.channels_last)
    assert augment(low, Rows(draws, "real", 5, 70)).dtype == torch.bfloat16


def test_strength_rises_while_d_overfits_and_falls_while_it_does_not() -> None:
    augment = Augment("cutout")
    found = Adaptive(augment, 0.6, images=1000, batch=50)
    assert augment.p == 0

    def updates(count: int, sign: float) -> None:
        for _ in range(count):
            found.take_in(found.plus({"r_t": torch.tensor(sign)}))

    updates(INTERVAL - 1, 0.9)
    assert augment.p == 0
    state = found.capture()
    updates(1, 0.9)
    assert augment.p == pytest.approx(INTERVAL * 50 / 1000)
    other = Adaptive(Augment("cutout"), 0.6, images=1000, batch=50)
    other.restore(state, torch.zeros(1))
    other.take_in(other.plus({"r_t": torch.tensor(0.9)}))
    assert other.capture() == found.capture()
    updates(10 * INTERVAL, 0.9)
    assert augment.p == MOST
    updates(INTERVAL, 0.5)
    assert augment.p == pytest.approx(MOST - 0.2)
    updates(10 * INTERVAL, 0.5)
    assert augment.p == 0


def test_targets_and_auto() -> None:
    ada = Augmentation(augment="auto").settled(FEW - 1)
    assert ada.augment == "ada" and Augmentation(augment="auto").settled(FEW).augment == "none"
    assert Augmentation(augment="diff").settled(9) == Augmentation(augment="diff")
    targets = [adaptive(ada, Augment("cutout"), 8, centred) for centred in (True, False)]
    assert [t.target for t in targets if t] == [SINGLE, PAIRS]
    assert adaptive(Augmentation(augment="diff"), Augment("cutout"), 8, True) is None


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ("colour,cutout", "there is no operation 'colour' in --augment-policy: did you mean 'color'?"),
        (" , ", "--augment-policy names no operation: use color,translation,cutout, or --augment none."),
    ],
)
def test_policies_that_are_none(policy: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        Augment(policy)
    assert sentence in str(caught.value)
