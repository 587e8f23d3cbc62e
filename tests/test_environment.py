"""pyproject.toml, constraints.txt, environment.yml and the Makefile agree; tests run offline."""

import shutil
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ranges(requirements: list[str]) -> dict[str, tuple[set[str], SpecifierSet]]:
    """Extras and version range of each requirement, by canonical name."""
    parsed = [Requirement(requirement) for requirement in requirements]
    return {canonicalize_name(r.name): (r.extras, r.specifier) for r in parsed}


def direct_dependencies() -> dict[str, tuple[set[str], SpecifierSet]]:
    extra = PROJECT["optional-dependencies"]
    return ranges(PROJECT["dependencies"] + extra["test"] + extra["docs"])


def pins() -> dict[str, str]:
    """Pinned versions of constraints.txt, by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def conda_dependencies() -> tuple[list[str], list[str]]:
    """The dependencies of environment.yml: those of conda and those of pip."""
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    return conda, pip["pip"]


def test_conda_and_pip_users_get_the_same_ranges():
    _, pip = conda_dependencies()
    assert ranges([line for line in pip if not line.startswith("-")]) == direct_dependencies()


def test_conda_users_get_the_package_the_pins_and_the_same_pythons():
    conda, pip = conda_dependencies()
    assert {"-e .", "-c constraints.txt"} <= set(pip)
    assert ranges(conda)["python"] == (set(), SpecifierSet(PROJECT["requires-python"]))


def test_every_direct_dependency_is_pinned_inside_its_range():
    versions = pins()
    for name, (_, specifier) in direct_dependencies().items():
        assert name in versions, f"{name} has no pin in constraints.txt"
        assert specifier.contains(versions[name]), f"{name}=={versions[name]} is not in {specifier}"


def test_pins_hold_on_every_platform():
    bound_to_cuda = [name for name in pins() if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert not bound_to_cuda


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    "target, command",
    [
        ("quickstart", ".venv/bin/tf-lightning fit -c configs/quickstart.yaml --ckpt_path last"),
        ("emoji", ".venv/bin/tf-lightning fit -c configs/autoencoder/emoji.yaml --ckpt_path last"),
        ("emoji", ".venv/bin/tf-lightning fit -c configs/emoji.yaml --ckpt_path last"),
        (
            "test",
            "OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile "
            "--no-loadscope-reorder",
        ),
        ("docs", "NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict"),
    ],
)
def test_the_documented_targets_run_the_documented_commands(target, command):
    shown = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert command in shown.stdout.splitlines()


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org"])
def test_tests_cannot_reach_the_network(host):
    with pytest.raises(ConnectionError, match="without network"):
        socket.create_connection((host, 80), timeout=1)


def test_tests_can_reach_their_own_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=1).close()
