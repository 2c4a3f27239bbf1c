"""Accumulation is exact: any split of a batch into micro-batches adds up to the whole batch's gradients."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugan.config.architectures import R3, Architecture, Dcgan, Mlp, Projected, Upsample
from frugan.config.objectives import Bce, Hinge, Objective, RpGan, WganGp
from frugan.data.loader import Batch
from frugan.gan.augment import OPERATIONS, Augment
from frugan.gan.levers import named
from frugan.gan.networks import build
from frugan.gan.step import Step
from frugan.memory.layout import Layout, split
from frugan.utils.draws import Draws

NETWORKS = {
    "r3": R3(latent_dim=5, width_g=4, width_d=4),
    "dcgan": Dcgan(latent_dim=5, width_g=4, width_d=4, norm_g="none", norm_d="none"),
    "dcgan-group": Dcgan(latent_dim=5, width_g=4, width_d=4, norm_g="group", norm_d="group", modulation=True),
    "upsample": Upsample(latent_dim=5, width_g=4, width_d=4, norm_g="none", norm_d="none"),
    "mlp": Mlp(latent_dim=5, width_g=4, width_d=8, norm_g="none", norm_d="none"),
    "projected": Projected(latent_dim=5, width_g=4, width_d=4, norm_g="none", norm_d="none", feature_width=2, modulation=True),
}
OBJECTIVES = {
    "bce": Bce(label_smoothing=0.1),
    "hinge": Hinge(),
    "wgan-gp": WganGp(),
    "rpgan": RpGan(),
}
assert OBJECTIVES.keys() == Objective.kinds.keys(), "add the new objective to OBJECTIVES above, its penalties with weights"
assert {type(n) for n in NETWORKS.values()} == set(Architecture.kinds.values()), "add the new network to NETWORKS above"


def micro_batches(total: int) -> st.SearchStrategy[list[int]]:
    """Every way to cut ``total`` samples into a row of micro-batches."""
    cuts = st.sets(st.integers(1, total - 1))
    return cuts.map(lambda c: [b - a for a, b in zip([0, *sorted(c)], [*sorted(c), total], strict=True)])


def gradients(
    network: str,
    objective: Objective,
    sizes: list[int],
    first: int,
    levers: Iterable[str] = (),
    augment: float | None = None,
    classes: str = "none",
    reuse: bool = False,
) -> dict[str, torch.Tensor]:
    options = NETWORKS[network]
    generator, discriminator = (n.double() for n in build(options, 12, 2, classes=0 if classes == "none" else 3))
    torch.manual_seed(1)
    with torch.no_grad():  # away from the start, where some layers are zero
        for p in [*generator.parameters(), *discriminator.parameters()]:
            p.add_(torch.randn_like(p), alpha=0.1)
    images = torch.randint(0, 256, (sum(sizes), 2, 12, 12), dtype=torch.uint8)
    labels = torch.randint(0, 3, (sum(sizes),))
    seen = None if augment is None else Augment(",".join(OPERATIONS), augment)
    step = Step(
        generator, discriminator, objective, options.latent_dim, Draws(3), flip=True, augment=seen,
        conditional=classes != "none", balanced=(0, 2) if classes == "balanced" else (),
        reuse_fakes=reuse,
    )  # fmt: skip
    step.keeps = reuse  # which only a whole batch does
    batch = Batch(lambda row, n: images[row - first : row - first + n], lambda row, n: labels[row - first : row - first + n])
    layout = Layout(tuple(sizes), named(levers))
    for phase in (step.discriminator_phase, step.generator_phase):
        phase(batch, first, layout)
    return {
        f"{name}.{k}": p.grad
        for name, net in (("g", generator), ("d", discriminator))
        for k, p in net.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", OBJECTIVES)
@settings(max_examples=8, deadline=None)
@given(
    sizes=micro_batches(9),
    penalties=st.sampled_from([(0.0, 0.0), (0.7, 0.0), (0.0, 0.4), (0.7, 0.4)]),
    first=st.integers(0, 10_000),
    augment=st.sampled_from([None, 0.7]),
    classes=st.sampled_from(["none", "natural", "balanced"]),
    reuse=st.booleans(),
)
def test_any_split_gives_the_gradients_of_the_whole_batch(
    network: str, kind: str, sizes: list[int], penalties: tuple[float, float], first: int, augment: float | None, classes: str,
    reuse: bool,
) -> None:  # fmt: skip
    options = {f: getattr(OBJECTIVES[kind], f) for f in vars(OBJECTIVES[kind])} | {"r1": penalties[0], "r2": penalties[1]}
    objective = type(OBJECTIVES[kind])(**options)
    whole = gradients(network, objective, [9], first, augment=augment, classes=classes, reuse=reuse)
    parts = gradients(network, objective, sizes, first, augment=augment, classes=classes, reuse=reuse)
    assert whole.keys() == parts.keys()
    scale = max(g.norm() for g in whole.values())
    assert scale > 0
    for name, gradient in whole.items():
        error = (gradient - parts[name]).norm() / gradient.norm().clamp_min(1e-6 * scale)
        assert error < 1e-10, (name, float(error))


@given(batch=st.integers(1, 300), parts=st.integers(1, 300))
def test_split_covers_the_batch_with_parts_as_equal_as_can_be(batch: int, parts: int) -> None:
    sizes = split(batch, parts)
    assert sum(sizes) == batch
    assert len(sizes) == min(parts, batch)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - 1 <= sizes[-1] > 0


def test_batch_norm_does_couple_samples_and_says_so() -> None:
    for options in NETWORKS.values():
        assert not any(n.couples_samples for n in build(options, 12, 2))
    assert all(n.couples_samples for n in build(Dcgan(), 28, 2))


def test_the_generators_phase_leaves_no_gradient_on_the_discriminator() -> None:
    options = NETWORKS["r3"]
    generator, discriminator = build(options, 8, 1)
    step = Step(generator, discriminator, RpGan(), options.latent_dim, Draws(0))
    step.generator_phase(Batch(lambda row, n: torch.zeros(n, 1, 8, 8, dtype=torch.uint8)), 0, Layout(sizes=(4,)))
    assert all(p.grad is None for p in discriminator.parameters())
    assert any(p.grad is not None for p in generator.parameters())


@pytest.mark.parametrize("network", [*NETWORKS.values(), Dcgan(latent_dim=5, width_g=4, width_d=4, modulation=True)])
def test_images_kept_for_both_phases_are_those_made_twice(network: Architecture) -> None:
    """To the bit, running statistics too, and G learns from the noise of D's phase."""

    def trained(*, keeps: bool, reuse: bool = True) -> dict[str, torch.Tensor]:
        generator, discriminator = build(network, 16, 1)
        step = Step(generator, discriminator, Bce(), network.latent_dim, Draws(0), reuse_fakes=reuse)
        step.keeps, passes = keeps, []
        generator.register_forward_hook(lambda *_: passes.append(1))
        batch = Batch(lambda row, n: torch.zeros(n, 1, 16, 16, dtype=torch.uint8))
        optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (discriminator, generator)]
        for first in (0, 8):
            for phase, optimizer in zip((step.discriminator_phase, step.generator_phase), optimizers, strict=True):
                phase(batch, first, Layout((8,)))
                optimizer.step()
                optimizer.zero_grad()
        assert len(passes) == (2 if keeps else 4)
        return {f"{i}/{k}": v for i, n in enumerate((generator, discriminator)) for k, v in n.state_dict().items()}

    once, twice, other = trained(keeps=True), trained(keeps=False), trained(keeps=False, reuse=False)
    assert all(torch.equal(once[k], twice[k]) for k in once)
    assert not all(torch.equal(twice[k], other[k]) for k in other)


def test_judging_for_the_report_changes_neither_network() -> None:
    options = Dcgan(latent_dim=5, width_g=4, width_d=4)
    generator, discriminator = build(options, 16, 1)
    step = Step(generator, discriminator, Bce(), options.latent_dim, Draws(0))
    before = {k: v.clone() for n in (generator, discriminator) for k, v in n.state_dict().items()}
    step.score_generated(0, Layout((3, 3)))
    after = {k: v for n in (generator, discriminator) for k, v in n.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)
