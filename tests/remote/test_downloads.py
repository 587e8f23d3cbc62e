"""Files at URLs: found, copied into a bounded cache, resumed, and never with a shown password."""

import base64
import errno
import importlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from support.http_server import http_server
from tf_lightning.errors import UserError
from tf_lightning.remote import downloads, listing, requests
from tf_lightning.remote.cache import cache_limit, cached_path, url_of
from tf_lightning.remote.downloads import local_copy
from tf_lightning.remote.listing import RemoteFile, find, stat


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TF_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "FIRST_DELAY", 0.001)
    return tmp_path / "cache"


@pytest.fixture
def site(tmp_path) -> Path:
    """The folder that the server serves."""
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


@pytest.fixture
def server(site):
    with http_server(site) as server:
        yield server


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def read(file: RemoteFile) -> bytes:
    with local_copy(file) as path:
        return path.read_bytes()


def gets(server) -> list[tuple[str, str]]:
    return [(path, ranges) for method, path, ranges in server.requests if method == "GET"]


def test_a_file_is_read_once_and_then_from_the_cache(site, server):
    (site / "a b.bin").write_bytes(content(1000))
    for _ in range(2):
        [file] = find(f"{server.url}/a%20b.bin")
        assert (file.name, file.size) == ("a b.bin", 1000)
        assert read(file) == content(1000)
    assert len(gets(server)) == 1


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("size", [0, 1, 1000, 2000, 2001])
def test_a_file_is_read_in_chunks_or_whole(site, server, monkeypatch, ranges, size):
    monkeypatch.setattr(downloads, "CHUNK", 1000)
    server.ranges = ranges
    (site / "a.bin").write_bytes(content(size))
    assert read(stat([f"{server.url}/a.bin"])[0]) == content(size)


@pytest.mark.parametrize("ranges", [True, False])
def test_failed_and_cut_requests_are_tried_again(site, server, monkeypatch, ranges):
    monkeypatch.setattr(downloads, "CHUNK", 500)
    server.fail_share, server.cut_share, server.ranges = 0.3, 0.3, ranges
    for number in range(10):
        (site / f"{number}.bin").write_bytes(content(2000, number))
    files = stat([f"{server.url}/{number}.bin" for number in range(10)])
    assert [read(file) for file in files] == [content(2000, number) for number in range(10)]


def test_an_interrupted_download_goes_on_where_it_stopped(site, server, monkeypatch):
    monkeypatch.setattr(downloads, "CHUNK", 1000)
    monkeypatch.setattr(requests, "ATTEMPTS", 2)
    (site / "a.bin").write_bytes(content(5000))
    [file] = find(f"{server.url}/a.bin")

    def fail_at_the_third_chunk(handler):
        server.status = 503 if len(gets(server)) > 2 else 0

    server.on_request = fail_at_the_third_chunk
    with pytest.raises(UserError, match=r"in 2 attempts \(HTTP status 503\)"):
        read(file)
    server.on_request, server.status = None, 0
    server.requests.clear()
    assert read(file) == content(5000)
    assert gets(server)[0] == ("/a.bin", "bytes=2000-2999")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_full_disk_is_told_as_one(site, server, monkeypatch, ranges):
    class FullDisk(BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads, "open_shared", lambda path, mode: FullDisk())
    monkeypatch.setattr(downloads, "CHUNK", 500)
    server.ranges = ranges
    (site / "a.bin").write_bytes(content(1000))
    with pytest.raises(UserError, match="no space left on the disk of"):
        read(*find(f"{server.url}/a.bin"))
    assert len(gets(server)) == 1  # it is not tried again


def test_a_folder_of_the_hub_is_listed_anew(monkeypatch):
    class Hub(MemoryFileSystem):
        def ls(self, path, detail=True, refresh=False):
            asked.append(refresh)
            return []

    asked = []
    monkeypatch.setattr(listing, "filesystem", lambda url: Hub())
    assert listing.list_folder("hf://datasets/me/data") == [] and asked == [True]


def test_a_small_file_takes_one_request_if_the_answer_has_its_version(site, server):
    (site / "a.bin").write_bytes(content(1000))
    [file] = stat([f"{server.url}/a.bin"])
    server.requests.clear()
    assert read(file) == content(1000)
    assert server.requests == [("GET", "/a.bin", "bytes=0-999")]


def test_a_file_is_asked_for_again_after_it_was_read_if_answers_have_no_version(site, server):
    (site / "a.bin").write_bytes(content(1000))
    server.sends_etags = False
    [file] = stat([f"{server.url}/a.bin"])
    server.requests.clear()
    assert read(file) == content(1000) and file.version == ""
    assert [method for method, *_ in server.requests] == ["GET", "HEAD"]


def answer(length: int, sent: bytes) -> Callable:
    """Return a hook that answers with a length and fewer or more bytes, and cuts the connection."""

    def respond(handler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.close_connection = True
        if handler.command == "GET":
            handler.wfile.write(sent)
        return True

    return respond


def test_a_wrong_length_is_told_before_anything_is_read(server):
    server.on_request = answer(10**15, b"abc")
    with pytest.raises(UserError, match="1,000,000,000,000,000 bytes, and the cache may hold"):
        read(*find(f"{server.url}/a.bin"))
    assert gets(server) == []


def test_no_more_than_its_limit_is_read_of_a_file(site, server, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_SMALL", 1000)
    (site / "a.bin").write_bytes(content(1001))
    with pytest.raises(UserError, match="a.bin has more than 1,000 bytes; check the URL"):
        downloads.read_small(f"{server.url}/a.bin")
    (site / "a.bin").write_bytes(content(1000))
    assert downloads.read_small(f"{server.url}/a.bin") == content(1000)


def test_a_file_of_unknown_size_is_read_up_to_the_limit_of_the_cache(site, server, monkeypatch):
    def without_length(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        if handler.command == "GET":
            handler.wfile.write(content(3_000_000))
        return True

    server.on_request = without_length
    [file] = find(f"{server.url}/a.bin")
    assert file.size is None and read(file) == content(3_000_000)
    monkeypatch.setenv("TF_LIGHTNING_CACHE_GB", str(1e-3))
    monkeypatch.setenv("TF_LIGHTNING_CACHE", str(site / "other"))
    with pytest.raises(UserError, match=r"has 1,\d+,\d+ bytes, and the cache may hold 1,000,000"):
        read(file)


def redirect(location: str) -> Callable:
    def respond(handler) -> bool:
        handler.send_response(302)
        handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    return respond


def test_a_login_is_not_sent_to_the_host_that_a_server_redirects_to(site, server, tmp_path):
    (site / "a.bin").write_bytes(content(1000))
    logins = []
    with http_server(tmp_path) as first:
        first.on_request = redirect(f"{server.url}/a.bin")
        server.on_request = lambda handler: logins.append(handler.headers.get("Authorization"))
        url = first.url.replace("http://", "http://me:secret@")
        assert read(*find(f"{url}/a.bin")) == content(1000)
    assert logins == [None, None]


def test_an_endless_redirect_is_one_sentence_at_once(server):
    server.on_request = redirect("/a.bin")
    with pytest.raises(UserError, match=r"a.bin cannot be read \(TooManyRedirects\); check the"):
        find(f"{server.url}/a.bin")
    assert len(server.requests) < 30


def test_a_failing_host_is_told_once_and_without_login(server, monkeypatch, caplog):
    monkeypatch.setattr(requests, "ATTEMPTS", 3)
    caplog.set_level("INFO")
    server.status = 503
    for name in "ab":
        with pytest.raises(UserError, match="could not be read in 3 attempts"):
            find(server.url.replace("http://", "http://me:secret@") + f"/{name}.bin")
    assert caplog.text.count("trying again") == 1
    assert "/a.bin cannot be read (HTTP status 503); trying again" in caplog.text
    assert "secret" not in caplog.text


def test_a_killed_download_goes_on_where_it_stopped(site, server, cache):
    (site / "a.bin").write_bytes(content(5000))
    code = (
        "from tf_lightning.remote import downloads, listing; downloads.CHUNK = 1000\n"
        f"file, = listing.find({server.url + '/a.bin'!r})\n"
        "with downloads.local_copy(file): pass\n"
    )
    server.on_request = lambda handler: time.sleep(30 * (len(gets(server)) > 2))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        deadline = time.monotonic() + 60
        while len(gets(server)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    server.on_request = None
    server.requests.clear()
    assert read(*find(f"{server.url}/a.bin")) == content(5000)
    assert gets(server) == [("/a.bin", "bytes=2000-4999")]


def test_a_file_that_is_replaced_between_two_runs_is_read_again(site, server):
    (site / "a.bin").write_bytes(content(1000))
    [old] = find(f"{server.url}/a.bin")
    assert read(old) == content(1000)
    (site / "a.bin").write_bytes(content(1000, seed=1))
    [new] = find(f"{server.url}/a.bin")
    assert new != old and read(new) == content(1000, seed=1)


def test_a_file_that_is_replaced_in_between_is_refused(site, server, monkeypatch):
    monkeypatch.setattr(downloads, "CHUNK", 500)
    (site / "a.bin").write_bytes(content(1000))
    [file] = find(f"{server.url}/a.bin")

    def replace_in_the_middle(handler):
        if handler.headers.get("Range", "").startswith("bytes=500"):
            (site / "a.bin").write_bytes(content(1000, seed=1))

    server.on_request = replace_in_the_middle
    with pytest.raises(UserError, match=r"a.bin was replaced while it was in use; run .* again"):
        read(file)
    server.on_request = None
    with pytest.raises(UserError, match="was replaced"):  # also if nothing was read before
        read(file)
    (site / "a.bin").unlink()
    with pytest.raises(FileNotFoundError):
        read(file)


def test_globs_find_the_files_that_a_server_lists(site, server):
    for name in ("b.txt", "a.txt", "c.jpg", "d/e.txt"):
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_bytes(name.encode())
    assert [file.name for file in find(f"{server.url}/*.txt")] == ["a.txt", "b.txt"]
    assert {file.name for file in find(f"{server.url}/**/*.txt")} >= {"a.txt", "b.txt", "e.txt"}
    assert find(f"{server.url}/*.tar") == []
    assert find(f"{server.url}/nothing.tar") == []


def test_a_login_in_a_url_is_used_and_never_shown(site, server):
    (site / "a.bin").write_bytes(content(10))
    server.login = "Basic " + base64.b64encode(b"me:secret").decode()
    url = f"{server.url}/a.bin"
    with_login = url.replace("http://", "http://me:secret@")
    assert read(*find(with_login)) == content(10)
    assert url_of(cached_path(with_login)) == with_login
    with pytest.raises(UserError, match="refused with HTTP status 401; check .* login") as error:
        find(with_login.replace("secret", "wrong-secret"))
    assert "wrong-secret" not in str(error.value) and error.value.__cause__ is None


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_is_one_sentence_after_one_attempt(server, status):
    server.status = status
    with pytest.raises(UserError, match=f"access to .*/a is refused with HTTP status {status}; "):
        find(f"{server.url}/a?X-Amz-Signature=secret")
    assert len(server.requests) == 2  # HEAD, GET


def test_an_unreachable_host_is_one_sentence(monkeypatch):
    monkeypatch.setattr(requests, "ATTEMPTS", 2)
    with pytest.raises(UserError, match=r"in 2 attempts \(ClientConnector.*check the URL"):
        find("http://127.0.0.1:9/a")


def test_an_unknown_scheme_and_a_missing_package_are_one_sentence(monkeypatch):
    with pytest.raises(UserError, match="the unknown scheme 'ftpx'; give a local path, or a URL"):
        find("ftpx://host/a")
    registry = importlib.import_module("fsspec.registry")
    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(registry._registry, scheme, raising=False)
        with pytest.raises(UserError, match=rf"not installed; pip install 'tf-lightning\[{scheme}"):
            find(f"{scheme}://bucket/a")


# The cache


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_the_least_recently_used_files_are_removed(site, server, monkeypatch, cache):
    monkeypatch.setenv("TF_LIGHTNING_CACHE_GB", str(4000 / 1e9))
    files = []
    for number in range(6):
        (site / f"{number}.bin").write_bytes(content(1000, number))
        files += find(f"{server.url}/{number}.bin")
    for number, file in enumerate(files[:4]):
        with local_copy(file) as path:
            os.utime(path, (number, number))
    with local_copy(files[0]) as used:
        os.utime(used, (0, 0))
        assert read(files[4]) == content(1000, 4)
        assert read(files[5]) == content(1000, 5)
        assert used.read_bytes() == content(1000, 0)  # as it was in use
    left = files_in(cache / "files")
    assert {"0.bin", "5.bin"} <= left and not {"1.bin", "2.bin"} & left and len(left) <= 4


def test_a_file_larger_than_the_cache_is_refused(site, server, monkeypatch):
    (site / "a.bin").write_bytes(content(1000))
    monkeypatch.setenv("TF_LIGHTNING_CACHE_GB", str(999 / 1e9))
    with pytest.raises(UserError, match="1,000 bytes, and the cache may hold 999; set TF_LIGHT"):
        read(*find(f"{server.url}/a.bin"))


def test_a_cache_that_cannot_be_created_is_one_sentence(site, server, monkeypatch):
    (site / "a.bin").write_bytes(content(10))
    monkeypatch.setenv("TF_LIGHTNING_CACHE", str(site / "a.bin"))
    with pytest.raises(UserError, match="a.bin cannot be created .Not a directory.; name another"):
        read(*find(f"{server.url}/a.bin"))


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "many"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, text):
    monkeypatch.setenv("TF_LIGHTNING_CACHE_GB", text)
    with pytest.raises(UserError, match=f"TF_LIGHTNING_CACHE_GB={text} must be a number above 0"):
        cache_limit()


# Many files


def test_small_files_are_copied_ahead_and_yielded_in_order(site, server):
    names = [f"{number}.bin" for number in range(50)]
    for name in names:
        (site / name).write_bytes(name.encode())
    files = stat([f"{server.url}/{name}" for name in names])
    ahead = downloads.fetch_ahead(files)
    assert next(ahead) == files[0]
    deadline = time.monotonic() + 60
    while len(gets(server)) < 2 * listing.THREADS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(gets(server)) >= 2 * listing.THREADS  # before they are asked for
    assert list(ahead) == files[1:]
    server.requests.clear()
    assert list(downloads.fetch_ahead(files)) == files and gets(server) == []
    for name, file in zip(names, files, strict=True):
        assert cached_path(file.url).read_bytes() == name.encode()


def test_a_small_file_that_cannot_be_copied_ahead_is_one_sentence(site, server):
    (site / "a.bin").write_bytes(b"a")
    files = stat([f"{server.url}/a.bin"])
    server.status = 403
    with pytest.raises(UserError, match="access to .*a.bin is refused"):
        list(downloads.fetch_ahead(files))
    assert list(downloads.fetch_ahead([Path("a"), Path("b")])) == [Path("a"), Path("b")]
