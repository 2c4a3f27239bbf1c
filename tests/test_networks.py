"""Every network, for any size, channels and normalisation."""

import pytest
import torch
from torch import nn

from frugan.config import recipes
from frugan.config.architectures import R3, Architecture, Dcgan, Norm, Upsampling
from frugan.gan.networks import build
from frugan.gan.networks.blocks import Modulated, means, norm
from frugan.gan.networks.generators import GENERATORS, ResizedConv
from frugan.gan.networks.r3 import Enlarge, Enlarged
from frugan.gan.summary import summarise
from frugan.utils.draws import Draws, Rows
from frugan.utils.errors import UserError

SMALL = {"width_g": 4, "width_d": 4, "latent_dim": 6}


@pytest.mark.parametrize("kind", Architecture.kinds)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (9, 3), (28, 1), (31, 3), (48, 3), (50, 1), (65, 3)])
def test_shapes_and_ranges_at_any_size(kind: str, size: int, channels: int) -> None:
    generator, discriminator = build(Architecture.of(kind)(**SMALL), size, channels)
    images = generator(torch.randn(3, 6))
    assert images.shape == (3, channels, size, size)
    logits = discriminator(images, Rows(Draws(0), "t", 0, 3))
    assert logits.shape[0] == 3 and logits.dim() == (2 if kind == "projected" else 1)
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    gradient.square().sum().backward()  # penalties need a second derivative
    assert all(torch.isfinite(p.grad).all() for p in discriminator.parameters() if p.grad is not None)


@pytest.mark.parametrize("upsampling", GENERATORS)
def test_every_way_to_enlarge_maps_at_odd_sizes(upsampling: Upsampling) -> None:
    for size in (9, 28, 65):
        generator, _ = build(Dcgan(**SMALL, upsampling=upsampling), size, 3)
        images = generator(torch.randn(2, 6))
        assert images.shape == (2, 3, size, size) and images.abs().max() <= 1
        assert any(isinstance(m, nn.ConvTranspose2d) for m in generator.modules()) == (upsampling == "transposed")


@pytest.mark.parametrize("upsampling", GENERATORS)
@pytest.mark.parametrize("kind", ["batch", "group", "none"])
def test_modulation_by_nothing_is_the_generator_without_and_by_noise_another(upsampling: Upsampling, kind: Norm) -> None:
    plain, _ = build(Dcgan(**SMALL, upsampling=upsampling, norm_g=kind), 28, 3)
    modulated, _ = build(Dcgan(**SMALL, upsampling=upsampling, norm_g=kind, modulation=True), 28, 3)
    taken = modulated.load_state_dict(plain.state_dict(), strict=False)  # what is in both has the same name
    layers = [m for m in modulated.modules() if isinstance(m, Modulated)]
    assert len(taken.missing_keys) == 2 * len(layers) and not taken.unexpected_keys
    z, rows = torch.randn(3, 6), Rows(Draws(0), "t", 0, 3)
    assert not torch.allclose(modulated(z, rows), plain(z), atol=1e-3) and torch.equal(modulated(z), modulated(z, rows))
    for i, layer in enumerate(layers):
        nn.init.zeros_(layer.weight)
        same = torch.allclose(modulated(z, rows), plain(z), atol=1e-6)
        assert same == (i + 1 == len(layers)), "one of them does nothing"


def test_what_modulates_says_the_class_and_is_learnt() -> None:
    generator, _ = build(Dcgan(**SMALL, norm_g="group", modulation=True), 16, 1, classes=3)
    assert generator.entry is not None
    z, rows = torch.randn(1, 6).expand(3, 6), Rows(Draws(0), "t", 0, 3, torch.arange(3))
    nn.init.zeros_(generator.blocks[0].get_parameter("0.weight"))  # then only what modulates has the noise
    images = generator(z, rows)
    assert (images[0] - images[1]).abs().max() > 1e-4
    images.square().sum().backward()
    assert generator.entry.classes.grad is not None and generator.entry.classes.grad.norm(dim=1).gt(0).all()


@pytest.mark.parametrize("kind", ["dcgan", "upsample", "mlp"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_networks_say_truly_whether_they_couple_samples(kind: str, norm: str) -> None:
    generator, discriminator = build(Architecture.of(kind)(**SMALL, norm_g=norm, norm_d=norm), 16, 1)
    z = torch.randn(4, 6)
    other = z.clone()
    other[0] += 1
    with torch.no_grad():
        for network, x, y in ((generator, z, other), (discriminator, generator(z), generator(other))):
            if network is discriminator:
                y = torch.cat([y[:1], x[1:]])
            a, b = (network(v, Rows(Draws(0), "t", 0, 4)) for v in (x, y))
            assert network.couples_samples == (not torch.allclose(a[1:], b[1:], rtol=0, atol=1e-9))


@pytest.mark.parametrize("kind", Architecture.kinds)
def test_initial_weights_come_from_the_seed(kind: str) -> None:
    options = Architecture.of(kind)(**SMALL)
    first, again, other = (build(options, 16, 1, seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("kind", Architecture.kinds)
def test_depth_is_an_option_and_too_much_of_it_an_error(kind: str) -> None:
    assert build(Architecture.of(kind)(**SMALL, depth=2), 32, 1)[0](torch.randn(2, 6)).shape == (2, 1, 32, 32)
    with pytest.raises(UserError, match="--depth 9 is too deep for 16 pixels"):
        build(Architecture.of(kind)(**SMALL, depth=9), 16, 1)


def test_groups_must_divide() -> None:
    with pytest.raises(UserError, match="--groups 3 does not divide"):
        build(R3(groups=3), 16, 1)


@pytest.mark.parametrize("kind", Architecture.kinds)
def test_summary_counts_every_parameter_and_reads_the_shapes(kind: str) -> None:

    chosen = recipes.get(kind).replace(image_size=20, channels=3, **SMALL)
    generator, discriminator = build(chosen.network, 20, 3)
    summary = summarise(chosen)
    for network, rows in ((generator, summary["generator"]), (discriminator, summary["discriminator"])):
        assert sum(row.parameters for row in rows) == sum(p.numel() for p in network.parameters())
    assert summary["generator"][-1].shape == (3, 20, 20)
    assert summary["discriminator"][-1].shape == ()


def test_residual_networks_begin_as_the_identity_and_scale_by_depth() -> None:
    from frugan.gan.networks.r3 import Residual

    block = Residual(8, R3(), gain=0.5)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("size", [8, 7])
def test_a_resized_convolution_is_a_convolution_of_what_is_resized(size: int) -> None:
    layer, x = ResizedConv(3, 5, size, bias=True).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    enlarged = nn.functional.interpolate(x, size=(size, size))
    assert torch.allclose(layer(x), nn.functional.conv2d(enlarged, layer.weight, layer.bias, padding=1), atol=1e-12)


@pytest.mark.parametrize(("length", "size"), [(7, 4), (5, 3), (8, 4), (9, 1), (3, 3), (13, 5)])
def test_means_as_products_are_adaptive_means(length: int, size: int) -> None:
    x = torch.randn(2, 3, length, length + 1, dtype=torch.float64)
    products = means(length, size, x) @ x @ means(length + 1, size, x).T
    assert torch.allclose(products, nn.functional.adaptive_avg_pool2d(x, size), atol=1e-14)


@pytest.mark.parametrize(("before", "after"), [(4, 7), (7, 14), (14, 28), (5, 11)])
def test_the_gradient_of_bilinear_upsampling_as_products_is_torchs(before: int, after: int) -> None:
    x = torch.randn(2, 3, before, before, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 3, after, after, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((enlarged(x) * direction).sum(), x)[0]
        for enlarged in (lambda x: Enlarged.apply(x, after), Enlarge(after))
    )
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 16, 48])
def test_dense_layers_are_normalised_over_groups_of_several_numbers(channels: int) -> None:
    network = nn.Sequential(*norm("group", channels, flat=True))
    x = torch.arange(1.0, channels + 1)[None]
    assert network(x).any()
