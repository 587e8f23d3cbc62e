"""An S3 server on this machine, by moto."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"}


@contextmanager
def s3_server() -> Iterator[None]:
    """Start the server, and make s3:// mean it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        forget_clients()
        yield
    forget_clients()
    server.stop()


def forget_clients() -> None:
    """Make fsspec create new clients, which read the variables of the environment again."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def upload(folder: Path, bucket: str) -> None:
    """Copy the files of a folder into a new bucket."""
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            key = file.relative_to(folder).as_posix()
            client.put_object(Bucket=bucket, Key=key, Body=file.read_bytes())
