"""The engine trains anyone's module as a plain loop does, whatever the optimizer, the number of samples and what is drawn."""

import copy
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, NAdam, Optimizer, Rprop

from frugan.config.recipe import Training
from frugan.memory import Engine, accumulate, levers
from frugan.memory.layout import CHECKPOINT_BLOCKS, MOST, Guarantee, Layout
from frugan.memory.recover import Change
from frugan.utils.errors import UserError

Batch = tuple[Tensor, Tensor]
STEP = "the step"
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD with momentum": partial(SGD, lr=0.1, momentum=0.9),
    "Adam": partial(Adam, lr=0.01),
    "NAdam": partial(NAdam, lr=0.01),
    "Rprop": partial(Rprop, lr=0.01),
    "Adagrad from 0.5": partial(Adagrad, lr=0.1, initial_accumulator_value=0.5),
}


def squares(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (module(x) - y).square().sum(1)


def batches(*counts: int) -> list[Batch]:
    random = torch.Generator().manual_seed(1)
    double = {"dtype": torch.float64, "generator": random}
    return [(torch.randn(n, 6, **double), torch.randn(n, 2, **double)) for n in counts]  # type: ignore[call-overload]


def network(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), *extra, nn.Linear(16, 2)).double()


def planned(model: nn.Module, optimizer: Optimizer, batch: int, layout: Layout | None = None, **named: object) -> Engine:
    engine = Engine(model, squares, optimizer, batch=batch, **named)  # type: ignore[arg-type]
    engine.plan(*batches(1)[0])
    if layout:
        engine.recovery.layouts[STEP] = layout
    return engine


def plain(model: nn.Module, optimizer: Optimizer, given: Sequence[Batch]) -> list[float]:
    """The loop that everybody writes."""
    losses = []
    for x, y in given:
        optimizer.zero_grad()
        loss = squares(model, x, y).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_batches_of_any_size_train_as_in_a_plain_loop(name: str) -> None:
    given = batches(12, 12, 5, 1, 7, 12, 11, 2)
    model = network()
    engine = planned(model, OPTIMIZERS[name](model.parameters()), 12, Layout.of(12, 3))
    with engine:
        losses = [engine.step(*batch).item() for batch in given]
    twin = network()
    wanted = plain(twin, OPTIMIZERS[name](twin.parameters()), given)
    assert losses == pytest.approx(wanted, rel=1e-12)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)
        assert ours.grad is None


def test_an_optimizer_that_has_trained_already_goes_on() -> None:
    first, rest = batches(12, 12), batches(12, 12, 12, 5)[2:]
    model = network()
    optimizer = NAdam(model.parameters(), lr=0.01)
    plain(model, optimizer, first)
    optimizer.zero_grad()
    twin, other = copy.deepcopy((model, optimizer))
    with planned(model, optimizer, 12, Layout.of(12, 2)) as engine:
        for batch in rest:
            engine.step(*batch)
    plain(twin, other, rest)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)


def test_planning_changes_nothing_that_training_could_notice() -> None:
    model = network(nn.BatchNorm1d(16), nn.Dropout(0.5))
    optimizer = Rprop(model.parameters(), lr=0.01)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    planned(model, optimizer, 12)
    after = (model.state_dict(), optimizer.state_dict(), torch.get_rng_state())
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][key]) for key, value in before[0].items())
    assert str(before[1]) == str(after[1]) and not optimizer.state
    assert torch.equal(before[2], after[2])
    assert all(p.grad is None for p in model.parameters())


UNFIT = {
    r"batches of 1 to 12 samples, .* not \[13, 13\]": (13, 13),
    r"not \[0, 0\]": (0, 0),
    r"as many in every tensor, not \[12, 11\]": (12, 11),
}


def test_a_batch_that_does_not_fit_is_refused_and_trains_nothing() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with planned(model, SGD(model.parameters(), lr=0.1), 12) as engine:
        for words, (n, m) in UNFIT.items():
            with pytest.raises(UserError, match=words):
                engine.step(torch.ones(n, 6).double(), torch.ones(m, 2).double())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda m, x, y: squares(m, x, y).mean(), r"\[\]"),
        (lambda m, x, y: squares(m, x, y)[:, None], r"\[\d+, 1\]"),
        (lambda m, x, y: (m(x) - y).square(), r"\[\d+, 2\]"),
        (lambda m, x, y: squares(m, x, y)[:1], r"\[1\]"),
    ],
    ids=["a mean", "[n, 1]", "a term an output", "one term for all"],
)
def test_a_loss_that_gives_no_term_a_sample_is_refused_before_anything_is_trained(loss: Callable[..., Tensor], shape: str) -> None:
    model = network()
    engine = Engine(model, loss, SGD(model.parameters(), lr=0.1), batch=12)
    with pytest.raises(UserError, match=rf"the loss gave a tensor of shape {shape} for \d+ samples: .*\(reduction='none'\)"):
        engine.plan(*batches(1)[0])


def test_without_a_plan_the_engine_says_what_to_do() -> None:
    model = network()
    engine = Engine(model, squares, SGD(model.parameters(), lr=0.1), batch=12)
    with pytest.raises(UserError, match=r"call plan\(\) with a few samples first"):
        engine.step(*batches(12)[0])
    with pytest.raises(UserError, match=r"call plan\(\) with a few samples first"), engine:
        pass


class Keeps(SGD):
    """Keeps the gradients of its update."""

    kept: tuple[Tensor, ...] = ()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.kept = tuple(p.grad.clone() for group in self.param_groups for p in group["params"])
        super().step(closure)


def dropping() -> tuple[nn.Module, nn.Module]:
    """A network that draws, and a block of it that draws."""
    torch.manual_seed(3)
    block = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.3))
    return network(nn.Dropout(0.5), block), block


def test_blocks_with_dropout_that_are_recomputed_give_the_same_bits() -> None:
    def updated(recomputed: bool) -> tuple[Tensor, ...]:
        model, block = dropping()
        optimizer = Keeps(model.parameters(), lr=0.1)
        engine = planned(model, optimizer, 12, Layout.of(12, 1, [CHECKPOINT_BLOCKS] if recomputed else []), blocks=[block])
        torch.manual_seed(7)
        with engine:
            engine.step(*batches(12)[0])
        return *optimizer.kept, torch.rand(1)  # what is drawn afterwards is the same too

    def alone() -> tuple[Tensor, ...]:
        model, _ = dropping()
        torch.manual_seed(7)
        x, y = batches(12)[0]
        (squares(model, x, y).sum() / 12).backward()
        return *gradients(model), torch.rand(1)

    kept, wanted = updated(False), alone()
    for others in (updated(True), wanted):
        assert all(torch.equal(a, b) for a, b in zip(kept, others, strict=True))


@pytest.mark.parametrize("draws", [True, False])
def test_micro_batches_of_a_model_that_draws_are_approximate(draws: bool) -> None:
    model = network(nn.Dropout(0.5)) if draws else network(nn.Dropout(0.5)).eval()
    told: list[Change] = []
    engine = planned(model, SGD(model.parameters(), lr=0.1), 12, changed=told.append)
    assert engine.choice is not None
    assert engine.choice.guarantee == Guarantee.BITWISE  # the whole batch
    job = engine.choice.chosen[STEP].job
    assert Layout.of(12, 3).guarantee(job.coupled or job.draws) == (Guarantee.APPROXIMATE if draws else Guarantee.REASSOCIATION)
    engine.recovery.freed = "return"
    scarce = Scarce(model, 1)
    with engine:
        engine.step(*batches(12)[0])
    scarce.hook.remove()
    assert [change.guarantee for change in told] == [Guarantee.APPROXIMATE if draws else Guarantee.REASSOCIATION]


class Scarce:
    """Memory runs out in the first ``times`` forward passes of ``module``, at its end."""

    def __init__(self, module: nn.Module, times: int) -> None:
        self.left = times
        self.hook = module.register_forward_hook(self._fail)

    def _fail(self, *_: object) -> None:
        if self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("none left")


def test_a_step_that_is_begun_anew_draws_the_same_again() -> None:
    def updated(times: int) -> list[Tensor]:
        told: list[Change] = []
        model = network(nn.Dropout(0.5), nn.BatchNorm1d(16))
        engine = planned(model, SGD(model.parameters(), lr=0.1), 12, changed=told.append)
        engine.recovery.freed = "reuse"
        torch.manual_seed(7)
        scarce = Scarce(model, times)
        with engine:
            engine.step(*batches(12)[0])
        scarce.hook.remove()
        assert [c.guarantee for c in told] == [Guarantee.BITWISE] * times
        return [*model.state_dict().values(), torch.rand(1)]

    assert all(torch.equal(a, b) for a, b in zip(updated(0), updated(1), strict=True))


def test_the_last_short_batch_leaves_no_sample_alone_under_batch_norm() -> None:
    model = network(nn.BatchNorm1d(16))
    engine = planned(model, SGD(model.parameters(), lr=0.1), 12, Layout.of(12, 6))
    with engine:
        assert torch.isfinite(engine.step(*batches(3)[0]))


def test_memory_for_moments_is_kept_until_the_optimizer_makes_them() -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).double()
    engine = Engine(model, lambda m, x: m(x).square().sum(1), Adam(model.parameters()), batch=2)
    engine.plan(torch.zeros(1, 512, dtype=torch.float64))
    two = 2 * 512 * 512 * 8
    assert two <= sum(t.nbytes for t in engine._reserved) <= two + 64
    with engine:
        engine.step(torch.ones(2, 512, dtype=torch.float64))
    assert not engine._reserved
    assert sum(v.nbytes for v in engine.optimizer.state[model[0].weight].values()) >= two


DEEP = """
import torch
from torch import nn
from frugan.memory import Engine, limit
from frugan.memory.layout import WHOLE_BATCH_NORM

layers = [nn.Conv2d(3, 16, 3, padding=1)]
for _ in range(14):
    layers += [nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1)]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
images = torch.randn(96, 3, 16, 16)

def planned(memory):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, lambda m, x: m(x).square().mean(1), optimizer, batch=96, memory=memory)
    engine.plan(images[:2])
    return engine

budget = planned(None).predicted - (20 << 20)
engine = planned(str(budget))
with engine:
    for _ in range(2):
        engine.step(images)
    print(engine.choice.chosen["the step"].layout.uses(WHOLE_BATCH_NORM.name), engine.predicted, limit.peak(engine.device), budget)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is only limited on Linux")
def test_what_tracing_a_deep_model_leaves_in_the_process_is_part_of_the_plan() -> None:
    done = subprocess.run([sys.executable, "-c", DEEP], capture_output=True, text=True, check=True)
    uncoupled, predicted, peak, budget = done.stdout.split()  # and nothing was changed on the way
    assert uncoupled == "True" and int(peak) <= int(budget)
    assert abs(int(predicted) / int(peak) - 1) < 0.03


@pytest.mark.skipif(sys.platform != "linux", reason="memory is only limited on Linux")
def test_a_budget_may_be_a_number_of_bytes() -> None:
    model = network()
    engines = [Engine(model, squares, SGD(model.parameters(), lr=0.1), batch=4, memory=m) for m in (1 << 31, "2GiB")]
    assert [engine.budget for engine in engines] == [1 << 31, 1 << 31]


def test_a_module_with_lazy_layers_is_asked_to_run_once_and_then_trains() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LazyLinear(2)).double()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"^2\.weight of the module has no shape yet, as its layer is lazy: run the module once"):
        Engine(model, squares, optimizer, batch=4)
    with pytest.raises(UserError, match=r"^0\.running_mean of the module has no shape yet"):
        Engine(nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.Linear(6, 2)), squares, optimizer, batch=4)
    (x, y) = batches(4)[0]
    model(x)
    with planned(model, optimizer, 4) as engine:
        assert torch.isfinite(engine.step(x, y))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_blocks_that_are_called_by_keywords_are_recomputed(dropout: float) -> None:
    """As those of `nn.TransformerEncoder` are, with masks and flags."""

    def trained(layout: Layout) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        optimizer = SGD(model.parameters(), lr=0.1)
        x, hidden = torch.randn(6, 5, 8), torch.zeros(6, 5, dtype=torch.bool)
        hidden[:, 3:] = True

        def loss(module: nn.Module, x: Tensor, hidden: Tensor) -> Tensor:
            return module(x, src_key_padding_mask=hidden).square().mean((1, 2))

        engine = Engine(model, loss, optimizer, batch=6, blocks=[*model.layers])
        engine.plan(x[:1], hidden[:1])
        engine.recovery.layouts[STEP] = layout
        torch.manual_seed(1)
        with engine:
            losses = [engine.step(x, hidden) for _ in range(2)]
        return [*losses, *model.parameters()]

    plain, leaner = trained(Layout((6,))), trained(Layout((6,), (CHECKPOINT_BLOCKS,)))
    assert all(torch.equal(a, b) for a, b in zip(plain, leaner, strict=True))


def test_a_block_may_be_given_its_samples_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
            self.outer = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.outer(input=self.inner(input=x))
            return found

    torch.manual_seed(0)
    model = Named().double()
    batch = batches(12)[0]
    found = []
    for blocks in ([], [model.inner, model.outer]):
        with levers.recomputing(blocks):
            accumulate(squares, model, batch, [12])
        found.append(gradients(model))
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) == 4


def test_what_an_engine_cannot_do_is_one_sentence() -> None:
    model = network()
    with pytest.raises(UserError, match="LBFGS asks for the loss"):
        Engine(model, squares, LBFGS(model.parameters()), batch=4)
    with pytest.raises(UserError, match="at least one sample"):
        Engine(model, squares, SGD(model.parameters(), lr=0.1), batch=0)
    with pytest.raises(UserError, match="at most 1,000,000, not 1,000,000,000"):
        Engine(model, squares, SGD(model.parameters(), lr=0.1), batch=10**9)
    (ours,) = (f.metadata["most"] for f in fields(Training) if f.name == "batch_size")  # which imports no torch
    assert ours == MOST
    for memory in (True, -1, "lots"):
        with pytest.raises(UserError, match=f"a budget of {memory!r} is no amount of memory"):
            Engine(model, squares, SGD(model.parameters(), lr=0.1), batch=4, memory=memory)
    for block, words in ((nn.Linear(6, 16), "a Linear"), ("0", "'0'")):
        with pytest.raises(UserError, match=rf"blocks\[1\] of the engine, {words}, is no part of the module"):
            Engine(model, squares, SGD(model.parameters(), lr=0.1), batch=4, blocks=[model[0], block])  # type: ignore[list-item]
    with pytest.raises(UserError, match="the module, a ReLU, has no parameters"):
        Engine(nn.ReLU(), squares, SGD(model.parameters(), lr=0.1), batch=4)
    for blocks, count in ((model[0], 1), (model, len(model)), (nn.ModuleList([model[0]]), 1)):
        assert len(Engine(model, squares, SGD(model.parameters(), lr=0.1), batch=4, blocks=blocks).blocks) == count
    engine = Engine(model, squares, SGD(model.parameters(), lr=0.1), batch=4)
    with pytest.raises(UserError, match=r"cannot be run on 2 samples, of shapes \[\[2, 6\]\]: squares\(\) missing"):
        engine.plan(batches(1)[0][0])
    for shapeless in ((), (torch.tensor(1.0),), (torch.zeros(0, 6), torch.zeros(0, 2))):
        with pytest.raises(UserError, match="cuts tensors along their first dimension"):
            engine.plan(*shapeless)
    with pytest.raises(UserError, match=r"shape \[\] for 2 samples"):
        Engine(model, lambda m, x: m(x).sum(), SGD(model.parameters(), lr=0.1), batch=4).plan(batches(1)[0][0])
    engine = planned(model, SGD(model.parameters(), lr=0.1), 4)
    (x, y), weights = batches(4)[0], [p.clone() for p in model.parameters()]
    squares(model, x, y).mean().backward()
    with engine, pytest.raises(UserError, match="has gradients already"):
        engine.step(x, y)
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), weights, strict=True))
    with pytest.raises(UserError, match=r"micro-batches of \[2, 1\] are 3 samples, but the tensors have \[4, 4\]"):
        accumulate(squares, model, (x, y), [2, 1])
