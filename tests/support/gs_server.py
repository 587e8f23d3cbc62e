"""A Google Cloud Storage server on this machine: the requests of gcsfs that read a bucket."""

import base64
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import fsspec
import pytest

from support.http_server import QuietServer, http_server
from support.hub import send

# gcsfs reads this when it is imported. It would ask by gRPC, which has no server here.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
LISTING, OBJECT = "/storage/v1/b/bucket/o", r"(/download)?/storage/v1/b/bucket/o/([^/]+)"


@contextmanager
def gs_server(folder: Path) -> Iterator[QuietServer]:
    """Serve the files of a folder as the bucket gs://bucket."""

    def answer(handler) -> bool:
        url = urlsplit(handler.path)
        if server.status:
            return send(handler, {"error": "refused"}, server.status)
        if url.path == LISTING:
            return send(handler, listing(folder, parse_qs(url.query)))
        download, name = re.fullmatch(OBJECT, url.path).groups()
        if download:
            handler.path = f"/{quote(unquote(name))}"
            return False
        file = folder / unquote(name)
        if not file.is_file():
            return send(handler, {"error": "not found"}, 404)
        return send(handler, describe(file, folder))

    with http_server(folder) as server, pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon", "endpoint_url": server.url})
        server.on_request = answer
        yield server


def listing(folder: Path, query: dict[str, list[str]]) -> dict:
    """List the objects with a prefix, and what their names begin with up to a delimiter."""
    prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
    items, prefixes = [], set()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name.startswith(prefix):
            begin, found, _ = name[len(prefix) :].partition(delimiter or "//")
            if found:
                prefixes.add(f"{prefix}{begin}{found}")
            else:
                items.append(describe(file, folder))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


def describe(file: Path, folder: Path) -> dict:
    """Return the metadata of an object."""
    digest = base64.b64encode(hashlib.md5(file.read_bytes()).digest()).decode()
    return {
        "kind": "storage#object",
        "bucket": "bucket",
        "name": file.relative_to(folder).as_posix(),
        "size": str(file.stat().st_size),
        "md5Hash": digest,
        "etag": digest,
        "generation": str(os.stat(file).st_mtime_ns),
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
    }
