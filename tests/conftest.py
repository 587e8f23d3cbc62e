"""Conditions of every test (one thread, no network) and the fixtures of several folders."""

import ipaddress
import os
import socket
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning causes them

import pytest
import torch

from support.sources import GreyImages, RepeatedWord
from tf_lightning.data import Mixture

DATA_DIR = Path(__file__).resolve().parents[2] / "shared" / "data"

torch.set_num_threads(1)  # tests that share cores are up to ten times slower with many threads


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data beside the checkout; skips the test without it."""
    if not DATA_DIR.is_dir():
        pytest.skip("needs the real data in ../shared/data, beside the checkout")
    return DATA_DIR


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Refuse connections to other machines; several processes of one test may connect locally."""
    connect, connect_ex, getaddrinfo = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.getaddrinfo,
    )

    def local_connect(self, address):
        refuse_remote(address)
        return connect(self, address)

    def local_connect_ex(self, address):
        refuse_remote(address)
        return connect_ex(self, address)

    def local_getaddrinfo(host, *args, **kwargs):
        refuse_remote((host,))  # before a name server is asked
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_connect)
        patch.setattr(socket.socket, "connect_ex", local_connect_ex)
        patch.setattr(socket, "getaddrinfo", local_getaddrinfo)
        yield


def refuse_remote(address) -> None:
    """Raise ConnectionError unless an address, a Unix path or a tuple (host, ...), is local."""
    if not isinstance(address, tuple) or is_local(address[0]):
        return
    raise ConnectionError(f"a test wants to reach {address[0]!r}; tests run without network")


def is_local(host: str | bytes | None) -> bool:
    """Return whether a host is this machine: no name, one of its names, or a loopback address."""
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", "0.0.0.0", "::", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run of `runs.config`; all tests share it, so none may change it."""
    from support import runs

    return runs.fit(tmp_path_factory.mktemp("session"))


@pytest.fixture
def mixture(tmp_path):
    """A function that builds a small Mixture; its arguments replace the defaults here."""

    def build(sources=None, weights=None, **changed) -> Mixture:
        arguments = {
            "autoencoder": "pixels",
            "patch_size": 4,
            "row_length": 64,
            "batch_size": 3,
            "vocab_size": 300,
            "cache_dir": str(tmp_path / "cache"),
        }
        sources = sources or {"words": RepeatedWord("red", 5), "pictures": GreyImages()}
        return Mixture(sources, weights, **(arguments | changed))

    return build


@pytest.fixture
def torchvision_folder(tmp_path, monkeypatch) -> Path:
    """An empty folder where torchvision looks for weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = Path(torch.hub.get_dir(), "checkpoints")
    assert folder == tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def squeezenet_weights(torchvision_folder) -> Path:
    """Random weights in the file where torchvision looks for SqueezeNet's."""
    from torchvision import models

    from tf_lightning.autoencoder.losses import LPIPS_WEIGHTS

    torch.manual_seed(0)
    file = torchvision_folder / LPIPS_WEIGHTS["squeeze"].url.rpartition("/")[2]
    torch.save(models.squeezenet1_1().state_dict(), file)
    return file


@pytest.fixture
def fails(capsys):
    """A function that runs a command that must fail, and returns its exit code and error line."""
    from tf_lightning.cli.main import main

    def run_command(*arguments) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tf-")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("tf-lightning: error: ") and len(lines[0]) < 400
        return stop.value.code, lines[0]

    return run_command


@pytest.fixture
def refused(fails):
    """A function that runs a command that must exit with code 1, and returns its error line."""

    def run_command(*arguments) -> str:
        code, line = fails(*arguments)
        assert code == 1
        return line

    return run_command
