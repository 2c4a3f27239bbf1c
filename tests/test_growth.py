"""What micro-batches of any size allocate is told by two small ones."""

import json
import sys
from typing import Any

import pytest
import torch

from frugan.config import recipes
from frugan.gan.levers import PHASES, named, variants
from frugan.memory import host, limit, private
from frugan.memory.calls import Calls
from frugan.memory.growth import LARGE, SMALL, Growth, traced
from frugan.memory.layout import Layout
from frugan.memory.trace import GRADIENTS, Timeline, trace
from frugan.training.model import Model

CPU = torch.device("cpu")


def near(count: int) -> object:
    """Small convolutions take other kernels for other sizes, which need up to a MiB, or 3%, more or less."""
    return pytest.approx(count, rel=0.03, abs=1 << 20)


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("phase", PHASES)
def test_a_growth_is_what_is_traced_at_any_size_with_gradients_and_without(name: str, phase: str) -> None:
    model = Model(recipes.get(name).replace(image_size=32, channels=3, flip=True, augment="diff"), CPU)
    growth = model.growth(phase, ())
    for count in (2, 5, 24):
        exact = model._trace(phase, Layout(sizes=(count,)))
        ours = growth.timeline((count,), accumulated=True)
        assert ours.peak().bytes == near(exact.peak().bytes)
        assert growth.peaks([count], several=True)[0] == near(ours.peak().bytes)
    for sizes in ((6,), (6, 6), (6, 5)):  # the first finds no gradients: what it would add to them becomes them
        held = {GRADIENTS: [], "noise": [*model.step.draws.kept()]} | model.held()
        exact = trace(lambda sizes=sizes: model.run(phase, Layout(sizes=sizes)), held)  # type: ignore[misc]
        assert growth.timeline(sizes).peak().bytes == near(exact.peak().bytes)


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("phase", PHASES)
def test_no_lever_does_with_less_than_the_least(name: str, phase: str) -> None:
    """Of samples that are computed at once; levers are looked at only where this would fit."""
    recipe = recipes.get(name).replace(image_size=32, channels=3)
    model = Model(recipe, CPU)
    least = model.growth(phase, ()).least(32)
    for levers in variants(recipe, phase, CPU, (model.generator.couples_samples, model.discriminator.couples_samples)):
        assert least <= model._trace(phase, Layout((32,), levers)).peak().bytes, levers


def test_d_is_traced_alike_whether_g_has_learnt_last_or_not() -> None:
    """While G learns no parameter of D asks for gradients."""
    recipe = recipes.get("dcgan").replace(image_size=16, channels=1, moments="8bit")
    before, after = Model(recipe, CPU), Model(recipe, CPU)
    after.warm()
    for trace_of in (lambda m: m._trace("D", Layout((2,))), lambda m: m.updating("D").timeline((1,))):
        assert trace_of(after).peak().bytes == near(trace_of(before).peak().bytes)
    gradients = [sum(t.sizes[s] for s in t.held if t.labels[s] == GRADIENTS) for t in (after._trace("D", Layout((2,))),)]
    assert gradients == [sum(p.numel() * 4 for p in after.discriminator.parameters())]
    updated = after.updating("D").timeline((1,))
    assert sum(updated.sizes[s] for s in updated.held if updated.labels.get(s) == "updated") == gradients[0]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_what_repeats_itself_and_is_not_run_again_allocates_what_it_would(name: str) -> None:
    recipe = recipes.get(name).replace(image_size=16, channels=3, augment="diff")
    with_calls, without = Model(recipe, CPU), Model(recipe, CPU)
    without._calls = None  # type: ignore[assignment]
    for model in (with_calls, without):
        for count in (SMALL, LARGE):
            model.warm(count)
    coupled = with_calls.generator.couples_samples, with_calls.discriminator.couples_samples
    for phase in PHASES:
        for levers in variants(recipe, phase, CPU, coupled):
            exact = [without._trace(phase, Layout((count,), levers)) for count in (SMALL, LARGE)]
            known = [with_calls._trace(phase, Layout((count,), levers)) for count in (SMALL, LARGE)]
            assert [t.levels() for t in known] == [t.levels() for t in exact], (phase, levers)
            assert [t.work().tolist() for t in known] == [t.work().tolist() for t in exact]
    assert sum(known is not None for known in with_calls._calls._known.values()) > 20  # so there was something to leave out


def test_a_call_on_the_like_is_not_run_again_unless_it_draws_moves_or_decides() -> None:
    calls = Calls()
    weight = torch.ones(2, 3)
    aten = torch.ops.aten

    def run(func: object, *arguments: object, **named: object) -> tuple[object, list[int]]:
        def ran(func: Any, args: Any, kwargs: Any) -> tuple[Any, list[int], int, None]:
            inside: list[int] = []
            with private.recording(inside):
                result = func(*args, **kwargs)
            return result, inside, 0, None

        result, (inside, _, _) = calls.run(func, arguments, named, ran)
        return result, inside

    (first, moves), (second, again) = (run(aten.mm.default, weight, weight.T) for _ in range(2))
    assert torch.equal(first, torch.full((2, 2), 3.0)) and torch.equal(second, torch.zeros(2, 2)) and moves == again
    (third, _) = run(aten.mm.default, weight.T, weight)
    assert torch.equal(third, torch.full((3, 3), 2.0)), "another shape"
    for _ in range(2):
        assert torch.equal(run(aten.gt.Scalar, weight, 0.5)[0], torch.ones(2, 3, dtype=torch.bool))
        assert run(aten.add_.Tensor, weight, weight)[0] is weight and weight[0, 0] == 2, (
            "changed once: the second time it is given back"
        )
        other = torch.zeros(2, 3)
        assert run(aten.set_.source_Tensor, other, weight)[0].data_ptr() == weight.data_ptr()
        assert bool(run(aten.add_.Tensor, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))[0].all())
        assert bool(run(aten.rand_like.default, weight)[0].any())
        assert run(aten._unsafe_view.default, weight, [3, 2])[0].data_ptr() == weight.data_ptr()
    assert bool(run(aten.add.Scalar, weight, 1)[0].any()) and bool(run(aten.add.Scalar, weight, 1.0)[0].any())
    assert not bool(run(aten.add.Scalar, weight, 1)[0].any())


def test_a_growth_comes_back_from_json_as_it_was() -> None:
    growth = Model(recipes.r3().replace(image_size=16, channels=1), CPU).growth("D", named(["separate_terms"]))
    again = Growth.from_dict(json.loads(json.dumps(growth.as_dict())))
    assert again.timeline((3, 2)).levels() == growth.timeline((3, 2)).levels()
    timeline = growth.timeline((5,), accumulated=True)
    assert growth.work(5).tolist() == timeline.work().tolist() and growth.fresh(5) == timeline.fresh


def test_where_few_samples_are_computed_otherwise_more_are_traced() -> None:
    counts: list[int] = []

    def run(count: int) -> Timeline:
        counts.append(count)
        return trace(lambda: [torch.ones(count * 100).exp() for _ in range(2 if count == 2 else 1)], {})

    growth = traced(run, 1)
    assert counts == [2, 3, 2, 6, 9]
    assert growth.timeline((100,), accumulated=True).peak().bytes == 2 * 4 * 100 * 100


def test_planning_imports_no_compiler() -> None:
    """It would stay in the process, with 150 MiB; this process may have it from other tests."""
    import subprocess

    script = """
import sys, torch
from frugan.config import recipes
from frugan.gan.levers import named
from frugan.training.model import Model
model = Model(recipes.r3().replace(image_size=16, channels=1), torch.device("cpu"))
model.growth("D", named(["penalty", "checkpoint_blocks", "separate_terms"]))
model.growth("G", named(["recompute_generator", "checkpoint_blocks"]))
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.skipif(host.libc() is None, reason="of Linux with glibc")
def test_code_that_was_let_go_comes_back() -> None:
    before = host.status("RssFile")
    host.drop_code()
    dropped = host.status("RssFile")
    assert dropped < before
    assert float(torch.nn.functional.conv2d(torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3)).sum()) == 2 * 4 * 36 * 27
    assert limit.most() >= before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere zeros are written")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_of_calls_that_are_not_run_are_zeros_that_hold_no_memory(dtype: torch.dtype) -> None:
    calls = Calls()
    given = torch.ones(1, 64, 512, 512, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def ran(func: Any, args: Any, kwargs: Any) -> tuple[Any, list[int], int, None]:
        return func(*args, **kwargs), [], 0, None

    first, _ = calls.run(torch.ops.aten.mul.Tensor, (given, given), {}, ran)
    before = host.resident()
    found = [calls.run(torch.ops.aten.mul.Tensor, (given, given), {}, ran)[0] for _ in range(8)]
    assert host.resident() - before < first.nbytes, "eight of them"
    for one in found[:2]:
        assert not one.any() and one.stride() == first.stride() and one.dtype == dtype
        assert one.untyped_storage().nbytes() == first.nbytes
    found[0].add_(1)
    assert found[0].all() and not found[1].any()
