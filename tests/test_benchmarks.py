"""What benchmarks and examples import from frugan and from one another is there: they are run by hand, and moves are missed."""

import ast
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_it_imports_is_there(script: Path) -> None:
    missing = []
    modules: dict[str, ModuleType] = {}
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            missing += [ast.unparse(node)] if not hasattr(modules[node.value.id], node.attr) else []
        if isinstance(node, ast.ImportFrom) and (script.parent / f"{node.module}.py").exists():  # one benchmark uses another
            there = ast.walk(ast.parse((script.parent / f"{node.module}.py").read_text()))
            names = {getattr(n, "name", None) or getattr(n, "id", None) for n in there}
            missing += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in names]
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "frugan":
            module = import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    try:
                        import_module(f"{node.module}.{alias.name}")
                    except ImportError:
                        missing.append(f"{node.module}.{alias.name}")
                if isinstance(found := getattr(module, alias.name, None), ModuleType):
                    modules[alias.asname or alias.name] = found
    assert not missing
