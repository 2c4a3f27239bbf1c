"""Batch norm over the whole batch: micro-batches give the gradients and the running statistics of the batch computed at once."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from frugan.config import recipes
from frugan.config.architectures import Architecture, Dcgan, Mlp, Projected, Upsample
from frugan.config.objectives import Bce, Objective, RpGan
from frugan.config.recipe import Recipe
from frugan.data.loader import Batch
from frugan.gan.augment import Augment
from frugan.gan.levers import jobs, named
from frugan.gan.networks import build
from frugan.gan.step import Step
from frugan.memory import Engine, accumulate, limit
from frugan.memory.batchnorm import WholeBatch, layers_of
from frugan.memory.candidates import Job
from frugan.memory.layout import WHOLE_BATCH_NORM, Guarantee, Layout, uncoupling
from frugan.memory.levers import recomputing
from frugan.memory.recover import Change, Recovery
from frugan.memory.search import Search
from frugan.training.model import Model
from frugan.utils.draws import Draws
from frugan.utils.errors import UserError

from .test_exactness import micro_batches

CPU = torch.device("cpu")
SMALL = {"latent_dim": 5, "width_g": 4, "width_d": 4, "depth": 2}
NETWORKS: dict[str, Architecture] = {
    f"{kind.kind}, {where}": kind(**SMALL, norm_g="none" if where == "D" else "batch", norm_d="none" if where == "G" else "batch")
    for kind in (Dcgan, Upsample, Mlp)
    for where in ("G", "D", "both")
}
NETWORKS["dcgan, modulated, both"] = Dcgan(**SMALL, upsampling="nearest", modulation=True)
NETWORKS["projected, both"] = Projected(latent_dim=5, width_g=4, width_d=4, feature_width=4, feature_levels=2, modulation=True)
assert all(build(n, 12, 2)["D" in where].couples_samples for where, n in NETWORKS.items())
EXACT = "whole_batch_norm"


def away_from_the_start(*networks: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (p for network in networks for p in network.double().parameters()):
            p.add_(torch.randn_like(p), alpha=0.1)


def outcome(
    options: Architecture,
    objective: Objective,
    sizes: Iterable[int],
    levers: Iterable[str] = (),
    *,
    classes: int = 0,
    seen: float = 0,
    reuse: bool = False,
) -> dict[str, Tensor]:
    """Gradients, running statistics and measurements of both phases; ``seen``: the chance of augmentations."""
    generator, discriminator = build(options, 12, 2, classes=classes)
    away_from_the_start(generator, discriminator)
    layout = Layout(tuple(sizes), named(levers))
    images = torch.randint(0, 256, (sum(layout.sizes), 2, 12, 12), dtype=torch.uint8)
    labels = torch.arange(sum(layout.sizes)) % max(1, classes)
    batch = Batch(lambda row, n: images[row - 7 : row - 7 + n], lambda row, n: labels[row - 7 : row - 7 + n] if classes else None)
    augment = Augment("color,translation", seen) if seen else None
    step = Step(
        generator, discriminator, objective, options.latent_dim, Draws(3), flip=True, conditional=bool(classes), augment=augment,
        reuse_fakes=reuse,
    )  # fmt: skip
    step.keeps = reuse  # which only a whole batch does
    found = {}
    for name, phase in (("d", step.discriminator_phase), ("g", step.generator_phase)):
        found |= {f"{name}/{k}": v for k, v in phase(batch, 7, layout).items()}
        for part, network in (("g", generator), ("d", discriminator)):
            found |= {f"{name}/{part}.{k}": p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
            found |= {f"{name}/{part}.{k}": b.clone() for k, b in network.named_buffers()}
            network.zero_grad()
    return found | {"score": step.score_generated(7, layout, batch.labels)}


def assert_equal(whole: dict[str, Tensor], parts: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert whole.keys() == parts.keys()
    scale = max(v.double().norm() for v in whole.values())
    for name, value in whole.items():
        error = (value - parts[name]).double().norm() / value.double().norm().clamp_min(1e-6 * scale)
        assert error < tolerance, (name, float(error))


@settings(max_examples=25)
@given(
    network=st.sampled_from(sorted(NETWORKS)),
    objective=st.sampled_from([Bce(label_smoothing=0.1), RpGan(r1=0, r2=0)]),
    sizes=micro_batches(7),
    levers=st.sets(st.sampled_from(["separate_terms", "recompute_generator", "checkpoint_blocks"])),
    classes=st.sampled_from([0, 3]),
    seen=st.sampled_from([0, 0.6]),
    reuse=st.booleans(),
)
def test_any_cut_gives_the_gradients_and_running_statistics_of_the_whole_batch(
    network: str, objective: Objective, sizes: list[int], levers: set[str], classes: int, seen: float, reuse: bool
) -> None:
    whole = outcome(NETWORKS[network], objective, [7], classes=classes, seen=seen, reuse=reuse)
    assert_equal(whole, outcome(NETWORKS[network], objective, sizes, {*levers, EXACT}, classes=classes, seen=seen, reuse=reuse))


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("seen", [0, 0.6])
def test_with_no_other_lever_images_are_kept_which_changes_nothing(network: str, seen: float) -> None:
    whole = outcome(NETWORKS[network], Bce(), [7], seen=seen)
    assert_equal(whole, outcome(NETWORKS[network], Bce(), [3, 2, 2], [EXACT], seen=seen))


def test_generated_images_are_made_once_where_discriminators_take_statistics() -> None:
    def passes(network: str, levers: set[str]) -> list[int]:
        """Of G, in both phases."""
        generator, discriminator = build(NETWORKS[network], 12, 2)
        step, layout = Step(generator, discriminator, Bce(), 5, Draws(3)), Layout((2, 2, 2), named(levers))
        found, count = [], 0

        def counting(*_: object) -> None:
            nonlocal count
            count += 1

        generator.register_forward_pre_hook(counting)
        for phase in (step.discriminator_phase, step.generator_phase):
            count = 0
            phase(Batch(lambda row, n: torch.zeros(n, 2, 12, 12, dtype=torch.uint8), lambda row, n: None), 0, layout)
            found.append(count // 3)
        return found

    made, judged = (len(layers_of(network)) for network in build(NETWORKS["dcgan, both"], 12, 2))
    assert made and judged
    assert passes("dcgan, both", {EXACT}) == [made + 1, made + 1 + 1 + made]
    more = made + judged + 1 + judged  # passes up to layers of D begin with the images
    assert passes("dcgan, both", {EXACT, "checkpoint_blocks"}) == [more, more + made]
    assert passes("dcgan, G", {EXACT}) == [made + 1, made + 1 + made]  # once as it is


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("levers", [[EXACT], [EXACT, "checkpoint_blocks"]])
def test_what_is_kept_of_a_batch_is_predicted(phase: int, levers: list[str]) -> None:
    recipe = recipes.get("dcgan").replace(image_size=32, channels=3, batch_size=48, width_g=8, width_d=8)
    model = Model(recipe, CPU)
    search = Search(jobs(recipe, CPU, (True, True), model.growth), CPU)
    layout = Layout.of(48, 6, named(levers))
    predicted = search.exact(search.jobs[phase], layout).moment.bytes
    traced = model._trace(search.jobs[phase].name, layout).peak().bytes
    kept = 40 * 3 * 32 * 32 * 4 * (1 + phase)
    assert traced <= predicted <= 1.02 * traced and search.jobs[phase].kept(layout) == (kept if levers == [EXACT] else 0)


def test_heads_beside_one_another_take_as_many_passes_as_the_longest() -> None:
    _, discriminator = build(Projected(latent_dim=5, width_g=4, width_d=4, feature_width=4, feature_levels=3), 32, 2)
    heads = [len(layers_of(head)) for head in [*discriminator.blocks][:4]]
    assert len({*heads}) > 1 and sum(heads) > max(heads)
    discriminator.train()
    whole, passes = WholeBatch(discriminator, sum(heads)), 0
    parts = [(torch.randn(2, 2, 32, 32),), (torch.randn(3, 2, 32, 32),)]

    def forward(x: Tensor) -> None:
        nonlocal passes
        passes += 1
        with whole.passing():
            discriminator(x)

    whole.measure(forward, parts)
    assert passes == len(parts) * max(heads) and len(whole.calls) == sum(heads)


def test_without_it_micro_batches_train_otherwise() -> None:
    whole = outcome(NETWORKS["dcgan, both"], Bce(), [7])
    with pytest.raises(AssertionError):
        assert_equal(whole, outcome(NETWORKS["dcgan, both"], Bce(), [4, 3]), 0.01)


class Residual(nn.Module):
    """As of a ResNet: two batch norms, one of them called twice, and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(channels, momentum=None)
        self.last = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.last(self.two(self.norm(self.one(self.norm(x).relu_())).relu_()))).relu()


def residual() -> nn.Sequential:
    torch.manual_seed(0)
    frozen = nn.BatchNorm2d(6).eval()
    network = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), frozen, Residual(6), Residual(6), nn.BatchNorm2d(6, track_running_stats=False),
        nn.LeakyReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4),
    )  # fmt: skip
    away_from_the_start(network)
    return network


def squares(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (module(x) - y).square().sum(1)


@settings(max_examples=15)
@given(sizes=micro_batches(9), blocks=st.booleans())
def test_any_cut_of_a_foreign_module_is_its_whole_batch(sizes: list[int], blocks: bool) -> None:
    found = []
    x, y = torch.randn(9, 3, 5, 5, dtype=torch.float64) + 3, torch.randn(9, 4, dtype=torch.float64)
    for cut in ([9], sizes):
        module = residual()
        with recomputing([module[3], module[4], module[5]] if blocks else ()):
            mean = accumulate(squares, module, (x, y), cut, whole_batch_norm=len(cut) > 1)
        found.append({"mean": mean} | {k: p.grad for k, p in module.named_parameters() if p.grad is not None})
        found[-1] |= {f"buffer {k}": b for k, b in module.named_buffers()}
        assert not any("whole_batch" in vars(m) or "forward" in vars(m) for m in module.modules())
    assert_equal(*found)


def test_the_engine_is_exact_in_micro_batches_and_says_so() -> None:
    x, y = torch.randn(12, 3, 5, 5, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    states = []
    for parts in (1, 5):
        module = residual()
        engine = Engine(module, squares, SGD(module.parameters(), lr=0.1), batch=12)
        engine.plan(x[:2], y[:2])
        job = engine.choice.chosen["the step"].job  # type: ignore[union-attr]
        assert (WHOLE_BATCH_NORM,) in job.variants and 12 in job.counts((WHOLE_BATCH_NORM,))
        layout = Layout.of(12, parts, [WHOLE_BATCH_NORM] if parts > 1 else [])
        assert layout.guarantee(coupled=True) == (Guarantee.REASSOCIATION if parts > 1 else Guarantee.BITWISE)
        engine.recovery.layouts["the step"] = layout
        with engine:
            for count in (12, 5, 12):  # the second batch is a short one
                engine.step(x[:count], y[:count])
        states.append(module.state_dict())
    assert_equal(*states)


def test_what_cannot_be_computed_again_is_refused() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) if x.sum() > 0 else x + self.norm.weight

    def penalised(module: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        return slope.square().sum(1)

    x = torch.cat([torch.ones(2, 3), -torch.ones(2, 3)])
    with pytest.raises(UserError, match="calls its layers alike for all samples"):
        accumulate(lambda m, x: m(x).sum(1), Uneven(), (x,), [2, 2], whole_batch_norm=True)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
    with pytest.raises(RuntimeError, match="differentiate twice"):
        accumulate(penalised, module, (torch.randn(4, 3),), [2, 2], whole_batch_norm=True)
    engine = Engine(module, penalised, SGD(module.parameters(), lr=0.1), batch=4)
    engine.plan(torch.randn(2, 3))
    with pytest.raises(UserError, match="whole_batch_norm=False"):
        engine._growth([torch.randn(2, 3)], (WHOLE_BATCH_NORM,))
    drawing = Engine(nn.Sequential(module, nn.Dropout()), squares, SGD(module.parameters(), lr=0.1), batch=4)
    drawing.plan(torch.randn(2, 3), torch.randn(2, 3))
    assert drawing.choice and drawing.choice.chosen["the step"].job.variants == [()]


def test_a_plan_cuts_exactly_and_only_where_that_can_be() -> None:
    def planned(recipe: Recipe) -> list[Job]:
        return jobs(recipe, CPU, (True, True), Model(recipe, CPU).growth)

    plain = recipes.get("dcgan").replace(image_size=16, channels=1, batch_size=24, width_g=8, width_d=8)
    search = Search(planned(plain), CPU)
    whole = [search.candidate(job, Layout.of(24, 1)).needs("reuse") for job in search.jobs]
    least = [*search.smallest().values()]
    assert all(c.layout.uncoupled for c in least)
    most = max(c.needs("return") for c in least)
    for available, guarantee in ((max(whole), Guarantee.BITWISE), (most, Guarantee.REASSOCIATION)):
        choice = search.choose(available)
        assert choice and choice.guarantee == guarantee
        assert all(c.needs(choice.freed) <= available for c in choice.chosen.values())
        assert all(c.layout.uncoupled == (len(c.layout.sizes) > 1) for c in choice.chosen.values())

    r3 = recipes.get("r3").replace(image_size=16, channels=1, batch_size=24, width_g=8, width_d=8)
    counts = [[job.counts(job.variants[0]) for job in jobs(r, CPU, (False, False), Model(r, CPU).growth)]
              for r in (r3, r3.replace(whole_batch_norm="yes"))]  # fmt: skip
    assert counts[0] == counts[1]  # without batch norm there is nothing that would have to be whole

    for asked, uncoupled in (
        ({"accumulation_steps": 3}, {True}), ({"accumulation_steps": 3, EXACT: "no"}, {False}),
        ({"accumulation_steps": 1}, {False}), ({}, {False, True}), ({"r1": 1.0}, {False}),
    ):  # fmt: skip
        first = planned(plain.replace(**asked))[0]
        assert {uncoupling(levers) for levers in first.variants} == uncoupled
    assert planned(plain.replace(**{EXACT: "yes"}))[0].counts(()) == [1]
    with pytest.raises(UserError, match="gradient penalties and batch norm in the discriminator"):
        planned(plain.replace(r1=1.0, **{EXACT: "yes"}))


def test_recovery_cuts_a_whole_batch_exactly() -> None:
    told: list[Change] = []
    layouts = [*Layout.of(16, 1).cheaper(named([EXACT, "checkpoint_blocks"]), smallest=16, coupled=True)]
    assert [str(layout) for layout in layouts[:2]] == [
        "blocks recomputed", f"micro-batches of 8, blocks recomputed, {WHOLE_BATCH_NORM.words}"
    ]  # fmt: skip
    assert layouts[-1].micro_batch == 1 and layouts[-1].guarantee(coupled=True) == Guarantee.REASSOCIATION

    def compute(layout: Layout) -> Layout:
        if layout.micro_batch > 4:
            raise torch.OutOfMemoryError("none left")
        return layout

    with limit.as_before():
        recovery = Recovery(
            [nn.BatchNorm1d(2)], CPU, {"D": Layout.of(16, 1)}, "return", levers={"D": named([EXACT])}, smallest={"D": 16},
            coupled=True, changed=told.append, needs=lambda phase, layout: None,
        )  # fmt: skip
        assert recovery.run("D", compute) == Layout.of(16, 4, named([EXACT]))
    assert [change.guarantee for change in told] == [Guarantee.REASSOCIATION] * 2
