"""The house is as CONTRIBUTING says: its rooms, their order, and how large a file may be."""

import ast
import re
import tomllib
from pathlib import Path

import frugan

ROOT = Path(__file__).parents[1]
SOURCES = Path(frugan.__file__).parent
MODULES = {path: path.read_text() for path in sorted(SOURCES.rglob("*.py"))}


def modules_imported(path: Path) -> set[str]:
    """The modules of frugan that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[path])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "frugan"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "frugan":
            base = SOURCES.parent / node.module.replace(".", "/")
            for alias in node.names:
                inner = base / alias.name
                is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def test_the_map_is_the_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    layers = [[name.strip().removeprefix("frugan.") for name in layer.split("|")] for layer in contract]
    drawn = re.search(r"```\n(cli .*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert drawn
    assert [line.split()[0] for line in drawn[1].splitlines()] == [room for layer in layers for room in layer]
    assert len(layers) <= 9
    rooms = {path.parent.name for path in SOURCES.glob("*/__init__.py")}
    assert rooms == {room for layer in layers for room in layer}


def test_every_file_can_be_read_in_one_go() -> None:
    assert {path.name: n for path, text in MODULES.items() if (n := len(text.splitlines())) > 350} == {}
    assert {path.name: n for path in MODULES if (n := len(modules_imported(path))) > 10} == {}


def test_the_loop_reads_in_a_minute() -> None:
    tree = ast.parse(MODULES[SOURCES / "training" / "loop.py"])
    loop = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Loop")
    methods = {node.name: node for node in loop.body if isinstance(node, ast.FunctionDef)}
    assert sum((m.end_lineno or 0) - m.lineno + 1 for m in (methods["run"], methods["advance"])) <= 60
    born = {
        node.attr
        for name, method in methods.items() if name != "__init__"
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }  # fmt: skip
    made = {
        node.attr for node in ast.walk(methods["__init__"]) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    assert born <= made  # no attribute is born outside the constructor
