"""Convolutions by products of matrices are torch's: any geometry, derivatives of any order, whole networks."""

import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp

from frugan.config import recipes
from frugan.gan.build import lay_out
from frugan.gan.networks import build, convolutions
from frugan.gan.networks.blocks import Mean
from frugan.gan.networks.convolutions import EVERY, Conv2d, ConvTranspose2d, Geometry, Operation, down, up
from frugan.memory import private
from frugan.utils.draws import Draws, Rows

private.load_forward_mode()
LAST = torch.channels_last


def maps(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return made.contiguous(memory_format=LAST) if len(shape) == 4 else made


def places(tensor: Tensor) -> list[int]:
    """Where numbers lie: strides, but for dimensions of one."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def geometries() -> st.SearchStrategy[tuple[int, int, int, int, int]]:
    """Kernel, stride, padding, height and width of large maps."""
    few = st.integers
    return st.tuples(few(1, 5), few(1, 3), few(0, 2), few(1, 9), few(1, 9))


@settings(max_examples=150, deadline=None)
@given(geometries(), st.sampled_from([1, 3]), st.sampled_from([1, 4]))
def test_any_geometry(sizes: tuple[int, int, int, int, int], a: int, b: int) -> None:
    k, stride, padding, height, width = sizes
    assume(min(height, width) + 2 * padding >= k)
    small = tuple((side + 2 * padding - k) // stride + 1 for side in (height, width))
    geometry = Geometry(k, stride, padding, (height, width), (small[0], small[1]), EVERY)
    large, little, kernel = maps(2, a, height, width), maps(2, b, *small), maps(b, a, k, k)
    ours, theirs = down(large, kernel, maps(b), geometry), nn.functional.conv2d(large, kernel, maps(b), stride, padding)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    ours = up(little, kernel, maps(a), geometry)
    theirs = nn.functional.conv_transpose2d(little, kernel, maps(a), stride, padding, tuple(geometry.lacking))
    assert ours.shape == large.shape and torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("products", [frozenset(), EVERY])
@pytest.mark.parametrize(("a", "k", "stride", "padding", "side"), [(1, 4, 2, 1, 6), (2, 3, 1, 1, 3), (4, 3, 2, 0, 6)])
def test_derivatives_of_any_order(a: int, k: int, stride: int, padding: int, side: int, products: frozenset[Operation]) -> None:
    size = (side + 2 * padding - k) // stride + 1
    geometry = Geometry(k, stride, padding, (side, side), (size, size), products)
    large, small, kernel = (m.requires_grad_() for m in (maps(2, a, side, side), maps(2, 3, size, size), maps(3, a, k, k)))
    biases = [maps(n).requires_grad_() for n in (3, a)]
    for operation, x, bias in ((down, large, biases[0]), (up, small, biases[1])):
        assert gradcheck(lambda *given: operation(*given, geometry), (x, kernel, bias), check_forward_ad=True)  # noqa: B023
        assert gradgradcheck(lambda *given: operation(*given, geometry), (x, kernel, bias))  # noqa: B023


CHOSEN = [  # of layers that have products in one precision or both
    Conv2d(1, 8, 4, 2, 1), Conv2d(8, 1, 3, 1, 1), ConvTranspose2d(8, 1, 4, 2, 1), ConvTranspose2d(8, 3, 4, 2, 1),
    Conv2d(8, 6, 4, 2, 1), Conv2d(5, 8, 3, 1, 1), ConvTranspose2d(8, 6, 4, 2, 1), ConvTranspose2d(8, 1, 3, 2, 1),
    Conv2d(1, 8, 1), Conv2d(8, 1, 1),
]  # fmt: skip
with torch.random.fork_rng(devices=[]), torch.no_grad():
    torch.manual_seed(0)
    for chosen in CHOSEN:
        chosen.reset_parameters()
        chosen.bias.fill_(0.5)  # else the gradient of a single one may be a small difference of large sums


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", CHOSEN, ids=repr)
@pytest.mark.parametrize("tiles", [True, False])
def test_layers_are_torchs(
    layer: Conv2d | ConvTranspose2d, precision: torch.dtype, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    layer.to(memory_format=LAST)
    monkeypatch.setattr(convolutions, "amx", lambda: tiles)
    monkeypatch.setattr(convolutions, "_planned", convolutions._planned.__wrapped__)  # what it finds is no one else's
    found = []
    for layer.by_products in (False, True):
        layer.zero_grad()
        x = maps(4, layer.in_channels, 8, 8, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            made = layer(x)
            tangent = jvp(layer, (x.detach(),), (x.detach().cos(),))[1]
        assert made.dtype == precision and (made.is_contiguous(memory_format=LAST) or not layer.by_products)
        nn.functional.leaky_relu(made, 0.2, inplace=True).float().square().mean().backward()
        assert all(p.grad is not None and places(p.grad) == places(p) for p in layer.parameters())
        found.append([t.detach().float() for t in (made, tangent, x.grad, *(p.grad for p in layer.parameters()))])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / one.norm()) < (2e-6 if precision == torch.float32 else 2e-2)


def test_others_than_plain_ones_stay_torchs() -> None:
    x = maps(2, 4, 8, 8)
    for layer in (
        Conv2d(4, 1, 3, padding="same"), Conv2d(4, 4, 3, groups=4), Conv2d(4, 1, 3, 1, 1, padding_mode="reflect"),
        Conv2d(4, 1, 3, 1, 2, dilation=2), Conv2d(4, 1, (3, 1), 1, (1, 0)), ConvTranspose2d(4, 4, 3, groups=2),
    ):  # fmt: skip
        layer.double()
        one = layer(x)
        layer.by_products = True
        assert torch.equal(one, layer(x))


def test_a_frozen_kernel_keeps_no_maps() -> None:
    """As in G's phase, where D learns nothing."""
    layer = Conv2d(1, 4, 4, 2, 1)
    layer.requires_grad_(False)
    layer.by_products = True
    x = torch.randn(2, 1, 8, 8, requires_grad=True) * 1
    there = weakref.ref(x)
    made = layer(x)
    del x
    assert there() is None
    made.sum().backward()


@pytest.mark.parametrize(("kernel", "padding", "grid"), [(3, 1, False), (3, 0, False), (4, 0, True), (1, 0, True)])
@pytest.mark.parametrize("side", [3, 4, 7, 9])
def test_means_of_convolutions(kernel: int, padding: int, grid: bool, side: int) -> None:
    if grid and side < kernel:
        return
    layer, x, others = Mean(5, 2, kernel, padding, grid=grid).double(), maps(3, 5, side, side + 1), maps(4, 5, kernel, kernel)
    separate = layer(x), layer.product(x, others)
    layer.by_products = True
    for one, other in zip(separate, (layer(x), layer.product(x, others)), strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.bfloat16()).dtype == torch.float32
    assert layer.to("meta")(x.to("meta")).shape == (3, 2)


@pytest.mark.parametrize("name", ["mlp", "upsample", "dcgan", "resize", "r3", "projected"])
@pytest.mark.parametrize(("side", "channels"), [(28, 1), (64, 3)])
def test_networks_are_the_same(name: str, side: int, channels: int) -> None:
    recipe = recipes.get(name).replace(image_size=side, channels=channels)
    z = torch.randn(3, recipe.network.latent_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for last in (False, True):
        generator, discriminator = (n.double() for n in build(recipe.network, side, channels, classes=3))
        lay_out(recipe.replace(channels_last=last), generator, discriminator)
        layers = [m.by_products for n in (generator, discriminator) for m in n.modules() if hasattr(m, "by_products")]
        assert all(by_products == last for by_products in layers)
        rows = Rows(Draws(0), "t", 0, 3, torch.tensor([0, 1, 2]))
        images = generator(z, rows)
        logits = discriminator(images, rows)
        logits.square().sum().backward()
        found.append([images, logits, *(p.grad for n in (generator, discriminator) for p in n.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10 * float(one.detach().abs().max()) + 1e-14)
