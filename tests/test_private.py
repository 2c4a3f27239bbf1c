"""Torch's private parts are used in one module, and frugan goes on without any of them."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.optim import Adam
from torch.utils import flop_counter

import frugan
from frugan.memory import Engine, private
from frugan.memory.calls import Calls
from frugan.memory.search import Search
from frugan.memory.trace import allocations, trace

SOURCES = Path(frugan.__file__).parent


@pytest.fixture
def take_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def take(name: str) -> None:
        monkeypatch.setitem(private.PARTS, name, "torch.nowhere.to_be_found")
        private.part.cache_clear()
        assert private.part(name) is None

    yield take
    private.part.cache_clear()


@pytest.mark.parametrize("name", private.PARTS)
def test_this_torch_has_every_part(name: str) -> None:
    private.part.cache_clear()
    assert private.part(name) is not None


def loss(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().flatten(1).sum(1)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))


def engine_of(module: nn.Module) -> Engine:
    return Engine(module, loss, Adam(module.parameters(), lr=0.1), batch=4)


def updated(engine: Engine) -> list[Tensor]:
    engine.plan(torch.zeros(1, 64))
    torch.manual_seed(1)
    with engine:
        engine.step(torch.randn(4, 64))
    return list(engine.module.state_dict().values())


@pytest.fixture(scope="module")
def usual() -> tuple[int, list[Tensor]]:
    """The predicted allocation and the weights after an update, with every part there."""
    engine = engine_of(model())
    weights = updated(engine)
    assert engine.choice is not None
    return engine.choice.chosen["the step"].needs("return"), weights


@pytest.mark.parametrize("name", private.PARTS)
def test_the_engine_goes_on_without_any_of_them(
    name: str, take_away: Callable[[str], None], usual: tuple[int, list[Tensor]]
) -> None:
    take_away(name)
    engine = engine_of(model())
    weights = updated(engine)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, usual[1], strict=True))
    assert engine.coupled and engine.choice is not None
    least = engine.choice.chosen["the step"].needs("return")
    if name.startswith("profiler"):
        assert usual[0] <= least <= private.UNMEASURED * usual[0]
    else:
        assert least == usual[0]


def meeting() -> None:
    """Two gradients that meet, and whose sum autograd takes in place."""
    x = torch.ones(1000, requires_grad=True) * 2
    ((x * 3).sum() + x.exp().sum()).backward()


@pytest.mark.parametrize("name", ["graph_task", "view"])
def test_where_nobody_tells_sums_in_place_count_as_copies(name: str, take_away: Callable[[str], None]) -> None:
    before = trace(meeting, {}).fresh
    take_away(name)
    assert trace(meeting, {}).fresh == before + 4000


def test_where_nobody_tells_what_changes_its_arguments_every_call_is_run(take_away: Callable[[str], None]) -> None:
    calls, ones = Calls(), torch.ones(2, 2)
    take_away("schema")
    for _ in range(2):
        found = calls.run(torch.ops.aten.mm.default, (ones, ones), {}, lambda func, args, kwargs: (func(*args), [], 0, None))
        assert bool(found[0].all())


def test_where_the_allocator_cannot_be_watched_a_fifth_is_added(take_away: Callable[[str], None]) -> None:
    timeline = trace(lambda: torch.ones(1000) + 1, {})
    search = Search([], torch.device("cpu"))
    assert allocations(lambda: torch.empty(1000)) == [4000, -4000]
    before = search.holds([timeline], "return")
    take_away("profiler_kind")
    assert allocations(lambda: torch.empty(1000)) == []
    assert search.holds([timeline], "return") == int(1.2 * before)


class Doubled(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent


@pytest.mark.parametrize("there", [True, False])
def test_functions_are_applied_in_transformations_too(there: bool, take_away: Callable[[str], None]) -> None:
    if not there:
        take_away("transforming")
    x = torch.ones(3, requires_grad=True)
    private.applied(Doubled, x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    found = torch.func.jvp(lambda x: private.applied(Doubled, x), (x.detach(),), (torch.ones(3) * 3,))
    assert torch.equal(found[1], torch.full((3,), 6.0))


def test_where_nobody_tells_there_are_no_tiles(take_away: Callable[[str], None]) -> None:
    take_away("amx")
    assert not private.amx()


def test_every_part_is_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would show nothing of it."""
    asked = set()
    found = private.part.__wrapped__

    def noting(name: str) -> object:
        asked.add(name)
        return found(name)

    source = (SOURCES / "memory" / "private.py").read_text()
    monkeypatch.setattr(private, "part", noting)
    tensor = torch.ones(2)
    private.address(tensor), private.is_view(tensor), private.in_backward(), private.batch_norm(), private.can_record()
    private.flops(torch.ops.aten.mm.default, tensor[None], tensor[:, None], result=tensor)
    private.unwrapped(Adam.zero_grad), private.load_forward_mode(), private.changes(torch.ops.aten.mm.default)
    private.amx(), private.applied(Doubled, tensor)
    assert asked == private.PARTS.keys() and source.count("torch.autograd._") == 2


def test_arithmetic_is_not_counted_where_torch_has_no_formulas(take_away: Callable[[str], None]) -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert torch.ops.aten.mm in flop_counter.flop_registry
    assert private.flops(torch.ops.aten.mm.default, a, b, result=a @ b) == 2 * 3 * 4 * 5
    take_away("flops")
    assert private.flops(torch.ops.aten.mm.default, a, b, result=a @ b) == 0


WITHOUT_WRAPPERS = """
import torch
from torch.optim import Adam
for name in ("add_param_group", "zero_grad"):
    method = getattr(Adam, name)
    assert method.__wrapped__
    setattr(torch.optim.Optimizer, name, method.__wrapped__)
    assert not hasattr(getattr(Adam, name), "__wrapped__")
from frugan.gan.optim import FrugalAdam
weight = torch.nn.Parameter(torch.ones(3))
optimizer = FrugalAdam([weight], 0.1, (0.0, 0.99))
weight.sum().backward()
optimizer.step()
optimizer.zero_grad()
assert weight.grad is None and torch.allclose(weight, torch.full((3,), 0.9)), weight
print("updated")
"""


def test_an_optimizer_whose_methods_nobody_wraps_is_taken_as_it_is() -> None:
    path = os.pathsep.join(filter(None, [str(SOURCES.parent), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_WRAPPERS],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout) == (0, "updated\n"), done.stderr


# The rest of what has an underscore, with why it is used where it is.
ALLOWED = {
    (
        "memory/trace.py",
        "torch.utils._python_dispatch.TorchDispatchMode",
    ): "torch has no other name for it, and nothing goes without",
    ("utils/signals.py", "os._exit"): "Python's, and documented",
    ("cli/__init__.py", "os._exit"): "the same",
    ("cli/__init__.py", "atexit._run_exitfuncs"): "Python's, and tested by Python itself",
    ("data/sources/tables.py", "table._fingerprint"): "of datasets, not of torch",
}


def is_private(name: str) -> bool:
    return any((part.startswith("_") and not part.startswith("__")) or part.endswith("_legacy") for part in name.split("."))


def own_names(trees: list[ast.AST]) -> set[str]:
    """Every name that frugan gives to something."""
    names = set()
    for node in (n for tree in trees for n in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def private_uses(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """What ``tree`` imports or reads that is private and not its own; as a string too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if is_private(alias.name))
            case ast.ImportFrom(module=str(module), names=names):
                found = [f"{module}.{alias.name}" for alias in names]
                yield from (name for name in found if is_private(name) and not name.startswith("frugan."))
            case ast.Attribute(attr=name) if is_private(name) and name not in own:
                yield ast.unparse(node)
            case ast.Constant(value=str(text)) if text.startswith("torch.") and " " not in text and is_private(text):
                yield text


def uses_of(folder: Path) -> set[tuple[str, str]]:
    trees = {file.relative_to(folder).as_posix(): ast.parse(file.read_text()) for file in folder.rglob("*.py")}
    own = own_names(list(trees.values()))
    return {(file, use) for file, tree in trees.items() for use in private_uses(tree, own)}


def test_nothing_else_uses_what_torch_does_not_promise() -> None:
    uses = uses_of(SOURCES)
    inside = {use for file, use in uses if file == "memory/private.py"}
    assert {path for path in private.PARTS.values() if is_private(path)} <= inside  # so it does see them
    assert {use for use in uses if use[0] != "memory/private.py"} == ALLOWED.keys()
