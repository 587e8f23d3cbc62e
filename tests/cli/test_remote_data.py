"""Commands whose data is at a URL: faults of servers and files end in one sentence."""

import io
import tarfile
from pathlib import Path

import pytest

from support.files import encoded_image, write_tar
from support.http_server import http_server
from tf_lightning.cli.main import main
from tf_lightning.remote import requests

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "my_pictures.yaml"
OPTIONS = [
    *("-c", str(RECIPE), "--data.row_length=256", "--data.cache_dir=prepared"),
    "--model.transformer={dim: 32, num_layers: 1, num_heads: 2, ffn_dim: 48, vocab_size: 300}",
]
NAMES = "red", "lime", "blue", "white", "black", "pink", "navy", "gold"
FILES = {f"{name}.png": encoded_image(name) for name in NAMES} | {
    f"{name}.txt": f"a {name} square".encode() for name in NAMES
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TF_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "FIRST_DELAY", 0.001)
    (tmp_path / "site").mkdir()
    write_tar(tmp_path / "site" / "a.tar", FILES)
    with http_server(tmp_path / "site") as server:
        yield server


def respond(handler, status: int, content: bytes = b"", **headers: str) -> bool:
    handler.send_response(status)
    for name, value in ({"Content_Length": str(len(content))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Connection", "close")  # it also sets `close_connection`
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(content)
    return True


def replace_the_file(handler) -> None:
    if handler.command == "GET":
        write_tar(Path("site/a.tar"), dict(reversed(FILES.items())))


PAGE = b"<!doctype html><html><body>There is no such file.</body></html>"
FAULTS = {
    "refused": (lambda handler: respond(handler, 403), "a.tar is refused with HTTP status 403"),
    "a web page": (lambda handler: respond(handler, 200, PAGE), "1 web page in place of the file"),
    "an empty file": (lambda handler: respond(handler, 200), "unusable (1 damaged tar, read up"),
    "an endless redirect": (
        lambda handler: respond(handler, 302, Location=handler.path),
        "a.tar cannot be read (TooManyRedirects); check the URL",
    ),
    "a huge length": (
        lambda handler: respond(handler, 200, b"abc", Content_Length=str(10**15)),
        "1,000,000,000,000,000 bytes, and the cache may hold",
    ),
    "a wrong length": (
        lambda handler: respond(handler, 200, b"abc", Content_Length="1000"),
        "could not be read in 12 attempts (ClientPayloadError); check the URL",
    ),
    "another file": (replace_the_file, "a.tar was replaced while it was in use; run the command"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_server_ends_in_one_sentence(fault, server, refused):
    server.on_request, message = FAULTS[fault]
    assert message in refused("prepare", *OPTIONS, "--data.paths", f"{server.url}/a.tar")


def test_members_of_a_tar_are_never_written_under_their_names(server, tmp_path, caplog):
    members = [(name, content) for name, content in FILES.items()]
    for name in ("../../up", "/tmp/absolute", "../cache/files/other"):
        members += [(f"{name}.png", encoded_image("red")), (f"{name}.txt", b"elsewhere")]
    with tarfile.open(tmp_path / "site" / "odd.tar", "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "red.png")):
            link = tarfile.TarInfo(f"link{target.replace('/', '_')}")
            link.type, link.linkname = kind, target
            tar.addfile(link)
    caplog.set_level("INFO")
    main(["prepare", *OPTIONS, "--data.paths", f"{server.url}/odd.tar"])
    assert "captions train: prepared 10 documents" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"site", "cache", "prepared"}
    copies = [path.name for path in (tmp_path / "cache" / "files").rglob("*") if path.is_file()]
    assert copies == ["odd.tar"] and not list(tmp_path.rglob("*absolute*"))


def test_a_printed_configuration_has_no_login(server, capsys):
    url = "https://me:secret@host/a.tar?key=secret"
    with pytest.raises(SystemExit):
        main(["fit", *OPTIONS, "--data.paths", url, "--print_config"])
    printed = capsys.readouterr().out
    assert "https://host/a.tar?sha256=" in printed and "secret" not in printed
