"""Imports point one way between packages and never in a circle; tests mirror the packages."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports from the lines above its own line. Modules of one line do not import each other.
LAYERS = """
    tf_lightning.errors
    tf_lightning.signals
    tf_lightning.files  tf_lightning.progress  tf_lightning.processes
    tf_lightning.checkpoint_file  tf_lightning.remote
    tf_lightning.sharded
    tf_lightning.folders  tf_lightning.ranges  tf_lightning.checkpoint  tf_lightning.hub
    tf_lightning.diffusion  tf_lightning.tokenizer
    tf_lightning.batch  tf_lightning.autoencoder
    tf_lightning.model
    tf_lightning.data.documents  tf_lightning.data.buckets
    tf_lightning.data.images
    tf_lightning.data.corpus  tf_lightning.data.readers
    tf_lightning.data.exclusion  tf_lightning.data.duplicates
    tf_lightning.data.quality
    tf_lightning.data.packing
    tf_lightning.data.stream
    tf_lightning.data.mixture
    tf_lightning.data.modules  tf_lightning.data.image_only  tf_lightning.data.datasets
    tf_lightning.data.__init__
    tf_lightning.training  tf_lightning.interop  tf_lightning.shapes  tf_lightning.drawings
    tf_lightning.generation
    tf_lightning.cli
    tf_lightning.__init__  tf_lightning.__main__
    evaluation
    callbacks
"""
LAYER = {name: i for i, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}

# `lightning` is what the project uses; mixing it with its twin `pytorch_lightning` is a TypeError.
FORBIDDEN = {
    "tf_lightning": {"pytorch_lightning"},
    "evaluation": {"tf_lightning", "lightning", "pytorch_lightning"},
    "callbacks": {"pytorch_lightning"},
    "benchmarks": {"pytorch_lightning"},
    "tests": {"pytorch_lightning"},
}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def modules() -> dict[str, Path]:
    """Our modules by dotted name; the file of a package itself is `package.__init__`."""
    files = [
        f for folder in ("tf_lightning", "evaluation", "callbacks") for f in python_files(folder)
    ]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}


def imported_names(node: ast.AST) -> set[str]:
    """Dotted names of all imports below `node`, including those inside functions."""
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative imports are not used"
            names |= {f"{child.module}.{alias.name}" for alias in child.names}
    return names


def our_modules(names: set[str], known: dict[str, Path]) -> set[str]:
    """The modules of `known` that define these names."""
    found = set()
    for name in names:
        while name:
            if match := {name, f"{name}.__init__"} & known.keys():
                found |= match
                break
            name = name.rpartition(".")[0]
    return found


def import_graph() -> dict[str, set[str]]:
    """The modules of this project that each module imports."""
    known = modules()
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in known.items()}
    return {name: our_modules(imported_names(tree), known) for name, tree in trees.items()}


def listed(module: str) -> str:
    """The entry of LAYERS for a module."""
    name = module
    while name not in LAYER:
        name = name.rpartition(".")[0]
        assert name, f"{module} is in no line of LAYERS"
    return name


def test_imports_are_found_at_any_depth():
    source = "import a.b as c, d\ndef f():\n    from e.f import g\n"
    assert imported_names(ast.parse(source)) == {"a.b", "d", "e.f.g"}
    known = dict.fromkeys(["a.__init__", "a.b", "e.f", "e.__init__"])
    assert our_modules({"a.b.c", "a.x", "e.f.g", "z.y"}, known) == {"a.b", "a.__init__", "e.f"}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_folder_imports_a_forbidden_package(folder):
    found = {
        (file.relative_to(ROOT).as_posix(), name)
        for file in python_files(folder)
        for name in imported_names(ast.parse(file.read_text(encoding="utf-8")))
        if name.split(".")[0] in FORBIDDEN[folder]
    }
    assert not found


def test_imports_point_one_way_between_packages():
    upward = [
        f"{module} imports {target}"
        for module, targets in import_graph().items()
        for target in targets
        if listed(module) != listed(target) and LAYER[listed(module)] <= LAYER[listed(target)]
    ]
    assert not upward


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter(import_graph()).prepare()  # raises CycleError with the circle


def test_our_modules_are_imported_at_the_top_of_a_file():
    """`cli` is exempt: a command imports what it needs when it runs, so that --help is fast."""
    known = modules()
    inside = [
        f"{module}.{function.name} imports {', '.join(found)}"
        for module, file in known.items()
        if not module.startswith(("tf_lightning.cli.", "tf_lightning.__init__"))
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        and (found := our_modules(imported_names(function), known))
    ]
    assert not inside


def test_importing_the_package_does_not_import_torch():
    code = "import sys, tf_lightning; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_the_folders_of_the_tests_mirror_the_packages():
    files = [*modules().values(), *python_files("benchmarks")]
    packages = {f.parent.relative_to(ROOT).as_posix().removeprefix("tf_lightning/") for f in files}
    folders = {file.parent.relative_to(ROOT / "tests").as_posix() for file in python_files("tests")}
    assert folders - {".", "support", "docs"} == packages - {"tf_lightning"}
