"""Weights of the networks used by metrics: where they are, and whether they can be downloaded."""

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
TIMEOUT = 1.5  # seconds for a host to accept a connection


def inception_weights(path: str | Path | None = None) -> Path:
    """Return the file of the InceptionV3 weights; download it if it is neither given nor cached.

    Raises:
        ValueError: the weights are absent and cannot be downloaded; raised within two seconds.
    """
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(
                f"no Inception weights at {path}; give an existing file, or none to download them"
            )
        return Path(path)
    cached = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rsplit("/", 1)[-1])
    if cached.is_file():
        return cached
    if not reachable(INCEPTION_URL):
        raise ValueError(
            f"{cached.name} (95.7 MB) is not at {cached} and github.com does not answer; download "
            f"{INCEPTION_URL} on another machine and copy it there, or give its path as weights"
        )
    cached.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(INCEPTION_URL, str(cached), hash_prefix="6726825d")
    return cached


def reachable(url: str, seconds: float = TIMEOUT) -> bool:
    """Return whether the host of `url`, or a proxy for it, accepts a connection in time."""
    host = urlparse(url).hostname
    proxy = getproxies().get(urlparse(url).scheme)
    if proxy and not proxy_bypass(host):
        url, host = proxy, urlparse(proxy).hostname
    port = urlparse(url).port or (80 if url.startswith("http:") else 443)
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            connected.set()
        except OSError:
            pass

    # In a thread, because a DNS lookup ignores the timeout and may take half a minute.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(seconds)
    return connected.is_set()


def file_hash(path: str | os.PathLike) -> str:
    """Return the first 12 hexadecimal digits of a file's SHA-256, as `sha256sum` prints them."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
