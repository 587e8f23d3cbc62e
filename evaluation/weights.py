"""Weights of the networks that metrics look through: where they are, whether the network is up."""

import hashlib
import os
import socket
import threading
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

import torch

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
PATIENCE = 1.5  # seconds for a host to answer


def inception_weights(path: str | Path | None = None) -> Path:
    """The InceptionV3 weights' file: the one given, the cached one, or the one downloaded.

    Raises:
        ValueError: there is none and none can be fetched; known within two seconds.
    """
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(
                f"no Inception weights at {path}; name an existing file or leave it out"
            )
        return Path(path)
    cached = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rsplit("/", 1)[-1])
    if cached.is_file():
        return cached
    if not reachable(INCEPTION_URL):
        raise ValueError(
            f"{cached.name} (95.7 MB) is not at {cached} and github.com does not answer: "
            f"fetch {INCEPTION_URL} elsewhere and put it there, or give its path as weights"
        )
    cached.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(INCEPTION_URL, str(cached), hash_prefix="6726825d")
    return cached


def reachable(url: str, seconds: float = PATIENCE) -> bool:
    """Whether the host of `url`, or the proxy on the way to it, takes a connection in time."""
    host = urlparse(url).hostname
    proxy = getproxies().get(urlparse(url).scheme)
    if proxy and not proxy_bypass(host):
        url, host = proxy, urlparse(proxy).hostname
    port = urlparse(url).port or (80 if url.startswith("http:") else 443)
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            answered.set()
        except OSError:
            pass

    # In a thread, because looking a name up heeds no timeout: it may take half a minute.
    asking = threading.Thread(target=connect, daemon=True)
    asking.start()
    asking.join(seconds)
    return answered.is_set()


def file_hash(path: str | os.PathLike) -> str:
    """The first 12 hexadecimal digits of a file's SHA-256, as `sha256sum` prints them."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
