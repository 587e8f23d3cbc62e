"""GET requests over HTTP for a range of bytes, with the version of the file that is sent."""

from collections.abc import Callable, Mapping
from typing import BinaryIO

import aiohttp
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem

TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)  # seconds
PIECE = 2**20  # bytes read at once


def get(
    fs: HTTPFileSystem,
    url: str,
    stream: BinaryIO,
    start: int = 0,
    end: int | None = None,
    limit: int | None = None,
    on_answer: Callable[[Mapping[str, str]], object] = lambda headers: None,
) -> bool:
    """Write the bytes `start` to `end` - 1 of a file to a stream.

    A server that does not send ranges sends the whole file, which then replaces the content of the
    stream.

    Args:
        fs: fsspec's file system for HTTP.
        url: URL of the file.
        stream: receives the bytes.
        start: first byte.
        end: the byte after the last one; None: ask for the whole file.
        limit: bytes of a whole file, after which reading stops; None: a whole file is not read.
        on_answer: receives the headers of the answer, before anything is written.

    Returns:
        Whether anything was written; False if the server sent a whole file that is not read.

    Raises:
        FileNotFoundError: there is no such file.
        aiohttp.ClientError: the request failed, perhaps after a part of the answer was written.
    """
    return sync(fs.loop, _get, fs, url, stream, start, end, limit, on_answer)


async def _get(fs, url, stream, start, end, limit, on_answer) -> bool:
    headers = dict(fs.kwargs["headers"])
    if end is not None:
        headers["Range"] = f"bytes={start}-{end - 1}"
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers=headers, timeout=TIMEOUT) as answer:
        if answer.status == 404:
            raise FileNotFoundError(url)
        if answer.status == 416:  # the file has become shorter, so there is nothing to write
            return True
        answer.raise_for_status()
        on_answer(answer.headers)
        is_wanted = answer.status == 206 or start == 0 and answer.content_length == end
        if end is None or not is_wanted:
            if limit is None:
                return False
            stream.seek(0)
            stream.truncate()
        left = limit if end is None or not is_wanted else end - start
        async for piece in answer.content.iter_chunked(PIECE):
            stream.write(piece)
            left -= len(piece)
            if left < 0:  # more than was asked for
                break
        return True
