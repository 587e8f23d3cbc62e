"""A Hugging Face hub on this machine that answers the requests of HfFileSystem over HTTP."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, constants

from support.http_server import QuietServer, http_server

COMMIT = {"id": "0" * 40, "title": "a commit", "date": "2026-01-01T00:00:00.000Z"}
API, FILES = r"/api/datasets/me/data(.*)", r"/datasets/me/data/resolve/main/(.*)"


@contextmanager
def hub_server(folder: Path, token: str = "") -> Iterator[QuietServer]:
    """Serve a folder as the data set hf://datasets/me/data.

    Args:
        folder: the files of the data set.
        token: what a request needs if the data set is private.
    """

    def answer(handler) -> bool:
        if token and handler.headers.get("Authorization") != f"Bearer {token}":
            return send(handler, {"error": "Invalid username or password."}, 401)
        url = urlsplit(handler.path)
        path = unquote(url.path)
        if found := re.fullmatch(FILES, path):
            handler.path = f"/{quote(found[1])}"
            return False
        found = re.fullmatch(API, path)
        match found and found[1].partition("/main"):
            case None:
                return send(handler, {"error": "Repository not found"}, 404, "RepoNotFound")
            case ("/tree", _, name):
                names = "**/*" if parse_qs(url.query)["recursive"] == ["true"] else "*"
                listed = [entry(file, folder) for file in (folder / name[1:]).glob(names)]
                return send(handler, listed)
            case ("/paths-info", *_):
                body = handler.rfile.read(int(handler.headers["Content-Length"])).decode()
                files = (folder / name for name in parse_qs(body)["paths"])
                return send(handler, [entry(file, folder) for file in files if file.exists()])
        return send(handler, {"id": "me/data", "sha": COMMIT["id"]})

    with http_server(folder) as server, pytest.MonkeyPatch.context() as patch:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()
        server.on_request = answer
        yield server


def entry(path: Path, folder: Path) -> dict:
    """Return what the hub says of a file or a folder."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "", "size": 0}
    content = path.read_bytes()
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "oid": oid, "size": len(content), "lastCommit": COMMIT}


def send(handler, content: object, status: int = 200, error: str = "") -> bool:
    """Answer with JSON."""
    body = json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    if error:
        handler.send_header("X-Error-Code", error)
    handler.end_headers()
    handler.wfile.write(body)
    return True
