"""What is imported is declared in pyproject.toml, and what is declared is imported."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"frugan", "tests"}


def plain(name: str) -> str:
    """The name of a package, however it is spelt."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: Iterable[str]) -> set[str]:
    return {plain(found[0]) for text in requirements if (found := re.match(r"[\w.-]+", text))}


def imported(folder: Path) -> set[str]:
    """The modules of others that are imported anywhere in ``folder``."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - OURS


CORE = declared(PROJECT["dependencies"])
EXTRAS = {name: declared(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}
FOUND = packages_distributions()


@pytest.mark.parametrize("folder", ["src", "tests"])
def test_what_is_imported_is_declared(folder: str) -> None:
    there = CORE | {package for name, packages in EXTRAS.items() if name != "dev" or folder == "tests" for package in packages}
    unknown = {module for module in imported(ROOT / folder) if not {plain(p) for p in FOUND.get(module, [module])} & there}
    assert not unknown


def test_what_every_installation_takes_is_imported() -> None:
    used = {plain(package) for module in imported(ROOT / "src") for package in FOUND.get(module, [])}
    assert used >= CORE


def test_the_command_line_does_not_import_what_only_pictures_take() -> None:
    script = "import sys, frugan, frugan.cli; print({'matplotlib', 'datasets', 'torchao'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "set()\n"
