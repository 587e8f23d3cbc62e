"""Weights are found by path, cache or download; missing weights are reported in two seconds."""

import hashlib
import socket
import time

import pytest

from evaluation import weights
from evaluation.weights import file_hash, inception_weights, reachable

NAME = "weights-inception-2015-12-05-6726825d.pth"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path


def test_missing_weights_without_network_are_reported_at_once_in_one_sentence(home):
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        inception_weights()
    assert time.perf_counter() - start < 2
    message = str(error.value)
    for part in (
        NAME,
        "95.7 MB",
        str(home / "hub" / "checkpoints" / NAME),
        weights.INCEPTION_URL,
    ):
        assert part in message
    assert "\n" not in message


def test_a_name_server_that_does_not_answer_costs_no_more_than_the_timeout(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(4) or [])
    start = time.perf_counter()
    assert not reachable("https://somewhere.example/file")
    assert time.perf_counter() - start < 2


def test_cached_weights_are_used_without_network_access(home, monkeypatch):
    monkeypatch.setattr(weights, "reachable", lambda url: pytest.fail("accessed the network"))
    cached = home / "hub" / "checkpoints" / NAME
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"weights")
    assert inception_weights() == cached


def test_weights_are_downloaded_into_the_cache_if_the_network_is_up(home, monkeypatch):
    monkeypatch.setattr(weights, "reachable", lambda url: True)
    downloads = []
    monkeypatch.setattr(
        weights.torch.hub,
        "download_url_to_file",
        lambda url, path, hash_prefix: downloads.append((url, path, hash_prefix)),
    )
    path = inception_weights()
    assert path == home / "hub" / "checkpoints" / NAME and path.parent.is_dir()
    assert downloads == [(weights.INCEPTION_URL, str(path), "6726825d")]


def test_a_missing_path_is_not_replaced_by_the_cache(tmp_path):
    with pytest.raises(ValueError, match="^no Inception weights at .*gone.pth; give an existing"):
        inception_weights(tmp_path / "gone.pth")


def test_a_host_that_accepts_connections_is_reachable_also_as_a_proxy(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reachable(f"http://127.0.0.1:{port}/file")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert reachable("https://somewhere.example/file")
    assert not reachable("https://somewhere.example/file")
    monkeypatch.delenv("https_proxy")
    assert not reachable(f"http://127.0.0.1:{port}/file")


def test_the_hash_is_the_start_of_sha256sum(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc" * 99_999)
    assert file_hash(file) == hashlib.sha256(b"abc" * 99_999).hexdigest()[:12]
