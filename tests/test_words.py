"""The words of torch's accelerators that frugan uses are there, take what frugan passes, and fail as they are documented to.

What is called is read from the source, so that a new call is checked by itself.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import frugan
from frugan.utils.accelerator import Accelerator, Metal, Unpeaked

from . import sim

SOURCE = Path(frugan.__file__).parent
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if "torch.cuda" in (text := path.read_text()) or "words." in text]


@dataclass(frozen=True)
class Called:
    """A call of one of torch's words."""

    backend: str  # cuda or mps
    name: str
    positional: int
    named: tuple[str, ...]
    where: str
    shared: bool  # over `torch.get_device_module`, so of every backend

    def __str__(self) -> str:
        return f"{self.where}-{self.backend}.{self.name}"


def calls() -> Iterator[Called]:
    """``torch.cuda.X(...)``, ``torch.mps.X(...)``, and ``words.X(...)`` or ``self.words.X(...)``."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            assert not any(isinstance(a, ast.Starred) for a in node.args) or not owner.startswith("torch.cuda"), "unreadable here"
            if owner in ("torch.cuda", "torch.mps", "words", "self.words"):
                backend = owner.removeprefix("torch.") if owner.startswith("torch.") else "cuda"
                names = tuple(k.arg or "" for k in node.keywords)
                yield Called(backend, node.func.attr, len(node.args), names, path.stem, not owner.startswith("torch."))


CALLS = list(dict.fromkeys(calls()))


def test_the_calls_are_found() -> None:
    found = {(c.backend, c.name) for c in CALLS}
    assert {("cuda", "mem_get_info"), ("cuda", "set_per_process_memory_fraction"), ("cuda", "get_device_capability")} <= found
    assert {("mps", "recommended_max_memory"), ("mps", "synchronize")} <= found
    assert len(CALLS) > 15


@pytest.mark.parametrize("called", CALLS, ids=str)
def test_torch_has_the_word_and_it_takes_what_is_passed(called: Called) -> None:
    word = getattr(getattr(torch, called.backend), called.name)
    inspect.signature(word).bind(*[None] * called.positional, **dict.fromkeys(called.named))


@pytest.mark.parametrize("called", [c for c in CALLS if c.shared], ids=str)
def test_the_simulated_device_has_every_shared_word(called: Called) -> None:
    inspect.signature(getattr(sim, called.name)).bind(*[None] * called.positional, **dict.fromkeys(called.named))


OWN = {"missing", "setup", "others", "fail", "allocations"}  # not torch.cuda's
PRIVATE = {"_is_in_bad_fork", "get_amp_supported_dtype"}  # no signature to be had: written in C++, or asked of other backends
NAMED = [
    name for name, value in vars(sim).items()
    if inspect.isfunction(value) and value.__module__ == sim.__name__ and name not in OWN | PRIVATE and not name.startswith("_")
]  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_words_of_the_simulated_device_have_the_parameters_of_cuda(name: str) -> None:
    def parameters(word: Callable[..., Any]) -> list[tuple[str, bool]]:
        every = inspect.signature(word).parameters.values()
        return [(p.name, p.default is inspect.Parameter.empty) for p in every]

    assert parameters(getattr(sim, name)) == parameters(getattr(torch.cuda, name))


def test_the_simulated_device_lacks_no_word_that_frugan_takes_from_its_backend() -> None:
    assert {c.name for c in CALLS if c.shared} <= {*NAMED}


def test_a_device_without_an_index_is_refused_by_the_limit_alone() -> None:
    """That of `set_per_process_memory_fraction` can be had without a GPU only from what it calls, which its source names."""
    from torch.cuda._utils import _get_device_index

    with pytest.raises(ValueError, match="specified index"):
        _get_device_index(torch.device("cuda"))
    for word, optional in (
        (torch.cuda.set_per_process_memory_fraction, False), (torch.cuda.mem_get_info, True),
        (torch.cuda.reset_peak_memory_stats, True), (torch.cuda.get_device_properties, True),
    ):  # fmt: skip
        source = inspect.getsource(word)
        assert ("_get_device_index(device, optional=True)" in source) == optional
        assert ("_get_device_index(device)" in source) != optional
    source = inspect.getsource(torch.cuda.set_per_process_memory_fraction)
    assert "fraction < 0 or fraction > 1" in source and "isinstance(fraction, float)" in source


@pytest.mark.parametrize("word", ["mem_get_info", "reset_peak_memory_stats"])
def test_another_kind_of_device_is_a_value_error_before_anything_is_asked(word: str) -> None:
    with pytest.raises(ValueError, match="Expected a cuda device"):
        getattr(torch.cuda, word)(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_before_cuda_is_begun_nothing_is_held_and_nothing_fails() -> None:
    there = Accelerator(torch.device("cuda", 0))
    assert there.can_be_limited
    assert (there.allocated(), there.reserved(), there.most_allocated(), there.most_reserved()) == (0, 0, 0, 0)
    there.release()
    with pytest.raises(RuntimeError):  # this one alone does not begin CUDA by itself: `frugan.utils.device.choose` does, first
        there.forget_peak()


def test_metal_overrides_every_method_whose_word_it_has_not() -> None:
    tree = ast.parse(inspect.getsource(Accelerator))
    lacking = set()
    for method in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        for node in ast.walk(method):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self.words."):
                word = getattr(torch.mps, ast.unparse(node.func).removeprefix("self.words."), None)
                try:
                    inspect.signature(word).bind(*node.args)  # type: ignore[arg-type]
                except TypeError:
                    lacking.add(method.name)
    assert {"total", "free", "reserved"} <= lacking  # the tree is read
    assert not lacking - {*vars(Metal), *vars(Unpeaked)}
    assert Metal(torch.device("mps", 0)).can_be_limited
