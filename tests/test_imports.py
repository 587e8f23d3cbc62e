"""The shape of the house: imports point one way, between packages."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["tf_lightning", "evaluation", "callbacks"]

# `lightning` is what the project uses; mixing it with its twin `pytorch_lightning` is a TypeError.
FORBIDDEN = {
    "tf_lightning": {"callbacks", "evaluation", "pytorch_lightning"},
    "evaluation": {"callbacks", "tf_lightning", "lightning", "pytorch_lightning"},
    "callbacks": {"pytorch_lightning"},
    "tests": {"pytorch_lightning"},
}


def imported_packages(source: str) -> set[str]:
    """Top-level packages that a source text imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_imports_are_found_wherever_they_stand():
    source = "import a.b as c, d\ndef f():\n    from e.f import g\nfrom . import h\n"
    assert imported_packages(source) == {"a", "d", "e"}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    found = {
        (file.relative_to(ROOT).as_posix(), name)
        for file in python_files(package)
        for name in imported_packages(file.read_text(encoding="utf-8")) & FORBIDDEN[package]
    }
    assert not found
