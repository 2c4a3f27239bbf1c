"""Every lever keeps the guarantee it states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from frugan.config import recipes
from frugan.config.architectures import R3, Architecture, Dcgan, Mlp, Projected, Upsample
from frugan.config.objectives import Objective, RpGan
from frugan.config.recipe import Recipe
from frugan.data.loader import Batch
from frugan.gan.augment import OPERATIONS, Augment
from frugan.gan.bends import bends_alone
from frugan.gan.build import lay_out
from frugan.gan.levers import LEVERS, jobs, named
from frugan.gan.networks import build
from frugan.gan.networks.blocks import Block, Head, Network
from frugan.gan.penalties import PENALTIES
from frugan.gan.slopes import Judged
from frugan.gan.step import Step
from frugan.memory import levers, private
from frugan.memory.layout import Guarantee, Layout
from frugan.training.model import Model
from frugan.utils.draws import Draws, Rows
from frugan.utils.errors import UserError

from .test_exactness import NETWORKS, OBJECTIVES

private.load_forward_mode()

COUPLED = {
    "dcgan-batch": Dcgan(latent_dim=5, width_g=4, width_d=4),
    "upsample-batch": Upsample(latent_dim=5, width_g=4, width_d=4, norm_d="batch"),
    "mlp-batch": Mlp(latent_dim=5, width_g=4, width_d=8, norm_d="batch"),
}


BENT = {  # discriminators that are linear but for leaky ReLUs
    "r3": R3(latent_dim=5, width_g=4, width_d=4),
    "dcgan": Dcgan(latent_dim=5, width_g=4, width_d=4, norm_d="none"),
    "upsample": Upsample(latent_dim=5, width_g=4, width_d=4),
    "mlp": Mlp(latent_dim=5, width_g=4, width_d=8),
}


def outcome(
    network: Architecture, objective: Objective, layout: Layout, augment: bool = False, classes: int = 0, four_passes: bool = True
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients, running statistics and measurements of both phases."""
    generator, discriminator = (n.double() for n in build(network, 12, 2, classes=classes))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in [*generator.parameters(), *discriminator.parameters()]:
            p.add_(torch.randn_like(p), alpha=0.1)
    images = torch.randint(0, 256, (sum(layout.sizes), 2, 12, 12), dtype=torch.uint8)
    labels = torch.arange(sum(layout.sizes)) % max(1, classes)
    batch = Batch(lambda row, n: images[row : row + n], lambda row, n: labels[row : row + n])
    step = Step(
        generator, discriminator, objective, network.latent_dim, Draws(3), conditional=bool(classes), four_passes=four_passes
    )  # fmt: skip
    step.augment = Augment(",".join(OPERATIONS), 0.7) if augment else None
    found = {}
    for name, phase in (("d", step.discriminator_phase), ("g", step.generator_phase)):
        found |= {f"{name}/{k}": v for k, v in phase(batch, 0, layout).items()}
    for name, net in (("g", generator), ("d", discriminator)):
        found |= {f"{name}.{k}": p.grad for k, p in net.named_parameters() if p.grad is not None}
        found |= {f"{name}.{k}": b for k, b in net.named_buffers()}
    return found


@settings(max_examples=60)
@given(
    network=st.sampled_from([*NETWORKS.values(), *COUPLED.values()]),
    kind=st.sampled_from(sorted(OBJECTIVES)),
    penalties=st.sampled_from([(0.0, 0.0), (0.7, 0.0), (0.0, 0.4), (0.7, 0.4)]),
    used=st.sets(st.sampled_from(sorted(LEVERS)), min_size=1),
    parts=st.sampled_from([1, 2]),
    augment=st.booleans(),
    classes=st.sampled_from([0, 3]),
)
def test_any_levers_give_what_they_promise(
    network: Architecture, kind: str, penalties: tuple[float, float], used: set[str], parts: int, augment: bool, classes: int
) -> None:
    if network in COUPLED.values():
        used = used - {"penalty", "whole_batch_norm"}  # refused: see the next test; not for one micro-batch: test_batchnorm.py
    options = vars(OBJECTIVES[kind]) | {"r1": penalties[0], "r2": penalties[1]}
    objective = type(OBJECTIVES[kind])(**options)
    plain = outcome(network, objective, Layout.of(6, parts), augment, classes)
    layout = Layout.of(6, parts, named(used))
    other = outcome(network, objective, layout, augment, classes)
    assert plain.keys() == other.keys()
    bitwise = all(g == Guarantee.BITWISE for n, g in layout.named().items() if not n.startswith("micro"))
    scale = max(v.double().norm() for k, v in plain.items() if k[1] == ".")
    for name, value in plain.items():
        if bitwise:
            assert torch.equal(value, other[name]), name
        else:
            error = (value - other[name]).double().norm() / value.double().norm().clamp_min(1e-6 * scale)
            assert error < 1e-11, (name, float(error))


@settings(max_examples=40)
@given(
    network=st.sampled_from(sorted(BENT)),
    kind=st.sampled_from(sorted(OBJECTIVES)),
    penalties=st.sampled_from([(0.7, 0.0), (0.0, 0.4), (0.7, 0.4)]),
    used=st.sets(st.sampled_from(["separate_terms", "checkpoint_blocks"])),
    parts=st.sampled_from([1, 2]),
    classes=st.sampled_from([0, 3]),
)
def test_penalties_in_four_passes_are_those_by_double_backward(
    network: str, kind: str, penalties: tuple[float, float], used: set[str], parts: int, classes: int
) -> None:
    options = vars(OBJECTIVES[kind]) | {"r1": penalties[0], "r2": penalties[1]}
    objective = type(OBJECTIVES[kind])(**options)
    wanted = outcome(BENT[network], objective, Layout.of(6, parts), classes=classes, four_passes=False)
    found = outcome(BENT[network], objective, Layout.of(6, parts, named(used)), classes=classes)
    assert wanted.keys() == found.keys()
    scale = max(v.double().norm() for k, v in wanted.items() if k[1] == ".")
    for name, value in wanted.items():
        error = (value - found[name]).double().norm() / value.double().norm().clamp_min(1e-6 * scale)
        assert error < 1e-11, (name, float(error))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("network", sorted(BENT))
def test_four_passes_as_training_lays_maps_out(network: str, channels: int) -> None:
    """With channels last and convolutions by products, which the tests above do without."""
    recipe = Recipe(recipe="bent", network=BENT[network], objective=RpGan(r1=0.7, r2=0.4)).replace(channels_last=True)
    generator, discriminator = (n.double() for n in build(BENT[network], 12, channels))
    lay_out(recipe, generator, discriminator)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in discriminator.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)  # biases too
    images = torch.randint(0, 256, (4, channels, 12, 12), dtype=torch.uint8)
    found = []
    for four_passes in (True, False):
        discriminator.zero_grad()
        step = Step(generator, discriminator, recipe.objective, 5, Draws(3), channels_last=True, four_passes=four_passes)
        step.discriminator_phase(Batch(lambda row, n: images[row : row + n]), 0, Layout.of(4, 1))
        found.append(torch.cat([p.grad.flatten() for p in discriminator.parameters()]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-12


def test_what_takes_four_passes() -> None:
    def takes(network: Architecture, precision: str = "fp32", four_passes: bool = True) -> bool:
        made = Step(*build(network, 24, 2), RpGan(), 5, Draws(0), precision=precision, four_passes=four_passes)
        return made.in_four_passes

    assert all(takes(network) for network in BENT.values())
    assert takes(BENT["r3"], "bf16") and not takes(BENT["r3"], "fp16") and not takes(BENT["r3"], four_passes=False)
    assert not any(takes(network) for network in COUPLED.values())
    assert not takes(Dcgan(latent_dim=5, width_g=4, width_d=4, norm_d="group"))
    assert not takes(Projected(latent_dim=5, width_g=4, width_d=4))  # several logits

    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    network = Network(Block(Unknown()), Head(nn.Flatten(), nn.Linear(4, 1), nn.Flatten(0)))
    assert not bends_alone(network) and bends_alone(Network(*[*network.blocks][1:]))
    assert not bends_alone(Network(Block(nn.Flatten(), nn.Linear(4, 3))))  # that may be several logits


def test_weights_that_are_frozen_stay_so_in_four_passes() -> None:
    network = BENT["r3"]
    generator, discriminator = build(network, 12, 2)
    discriminator.blocks[0].requires_grad_(False)
    images = torch.randint(0, 256, (4, 2, 12, 12), dtype=torch.uint8)
    found = []
    for four_passes in (True, False):
        discriminator.zero_grad()
        step = Step(generator, discriminator, RpGan(r1=1.0), 5, Draws(3), four_passes=four_passes)
        step.discriminator_phase(Batch(lambda row, n: images[row : row + n]), 0, Layout.of(4, 1))
        found.append([p.grad for p in discriminator.parameters()])
    frozen = [not p.requires_grad for p in discriminator.parameters()]
    assert [g is None for g in found[0]] == [g is None for g in found[1]] == frozen
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True) if a is not None)


def test_penalties_by_jvp_are_refused_with_batch_norm() -> None:
    asked = recipes.get("dcgan").replace(image_size=16, channels=1, r1=1.0, penalty="jvp")
    with pytest.raises(UserError, match="batch norm"):
        jobs(asked, torch.device("cpu"), (True, True), Model(asked, torch.device("cpu")).growth)
    auto = asked.replace(penalty="auto")
    assert all(
        LEVERS["penalty"] not in levers
        for levers in jobs(auto, torch.device("cpu"), (True, True), Model(auto, torch.device("cpu")).growth)[0].variants
    )


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Block], Tensor]:
    """A random discriminator: convolutions, normalisations and activations in blocks, ending in a logit; and its images."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    channels = draw(st.integers(1, 3))
    images = torch.randn(draw(st.integers(1, 4)), channels, 8, 8, dtype=torch.float64)
    blocks, before = [], channels
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([2, 4]))
        conv = nn.Conv2d(before, out, draw(st.sampled_from([1, 3])), padding="same", bias=draw(st.booleans()))
        norm = [nn.GroupNorm(2, out)] if draw(st.booleans()) else []
        activation = draw(st.sampled_from([nn.LeakyReLU(0.2, inplace=True), nn.ReLU(), nn.SiLU(), nn.Tanh()]))
        resample = [nn.AvgPool2d(2)] if draw(st.booleans()) and len(blocks) < 2 else []
        blocks.append(Block(conv, *norm, activation, *resample))
        before = out
    blocks.append(Block(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, 1), nn.Flatten(0)))
    return blocks, images


@settings(max_examples=60)
@given(chain=chains(), function=st.sampled_from([function for *_, function in PENALTIES]), recompute=st.booleans())
def test_penalties_by_jvp_are_those_by_double_backward(
    chain: tuple[list[Block], Tensor], function: object, recompute: bool
) -> None:
    blocks, images = chain
    network = nn.Sequential(*blocks).double()
    weights = list(network.parameters())

    x = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    wanted = torch.autograd.grad(function(gradient).sum(), weights, allow_unused=True, materialize_grads=True)  # type: ignore[operator]

    leaf = gradient.detach().requires_grad_(True)
    (direction,) = torch.autograd.grad(function(leaf).sum(), leaf)  # type: ignore[operator]
    logits, slope = levers.directional(blocks, images, direction, recompute=recompute)
    assert torch.equal(logits, network(images))
    got = torch.autograd.grad(slope.sum(), weights, allow_unused=True, materialize_grads=True)

    # The gradient as one vector: a bias before a norm has a gradient of rounding alone.
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (wanted, got))
    assert (a - b).norm() <= 1e-12 * a.norm().clamp_min(1e-30)


def test_penalties_by_jvp_compile_whole() -> None:
    _, discriminator = (n.double() for n in build(R3(latent_dim=4, width_g=2, width_d=2), 8, 1))
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    direction = torch.randn_like(images)
    blocks = list(discriminator.blocks)

    def penalty(x: Tensor, v: Tensor) -> Tensor:
        return levers.directional(blocks, x, v)[1].sum()

    penalty(images, direction).backward()
    wanted = {name: p.grad.clone() for name, p in discriminator.named_parameters() if p.grad is not None}
    discriminator.zero_grad()
    torch.compile(penalty, fullgraph=True, backend="aot_eager")(images, direction).backward()
    assert wanted
    for name, p in discriminator.named_parameters():
        if name in wanted:
            assert torch.allclose(p.grad, wanted[name], rtol=1e-12, atol=1e-15), name


@pytest.mark.parametrize("used", [[], ["separate_terms"], ["penalty"]])
@pytest.mark.parametrize("penalties", [(0.0, 0.0), (0.7, 0.4)])
def test_images_get_no_gradients_that_nobody_reads(used: list[str], penalties: tuple[float, float]) -> None:
    if "penalty" in used and not any(penalties):
        return
    r1, r2 = penalties
    network, objective = R3(latent_dim=5, width_g=4, width_d=4), RpGan(r1=r1, r2=r2)
    generator, discriminator = build(network, 12, 2)
    step = Step(generator, discriminator, objective, network.latent_dim, Draws(3))
    seen: list[Tensor] = []
    judge, judge_slopes = step._judge, step._penalised

    def watch(images: Tensor, rows: Rows, layout: Layout) -> Tensor:
        seen.append(images)
        return judge(images, rows, layout)

    def watch_slopes(images: Tensor, rows: Rows, layout: Layout) -> Judged:
        seen.append(images)
        return judge_slopes(images, rows, layout)

    step._judge, step._penalised = watch, watch_slopes  # type: ignore[method-assign]
    images = torch.randint(0, 256, (6, 2, 12, 12), dtype=torch.uint8)
    step.discriminator_phase(Batch(lambda row, n: images[row : row + n]), 0, Layout.of(6, 2, named(used)))
    assert len(seen) >= 4
    assert all(image.grad is None for image in seen if image.is_leaf)
