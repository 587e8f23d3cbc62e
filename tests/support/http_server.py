"""An HTTP server on this machine with ranges and ETags, which can fail in chosen ways."""

import hashlib
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyHandler(SimpleHTTPRequestHandler):
    """Serves the files of a folder.

    The server's attributes choose its faults:
        fail_share: share of the requests that are answered with 503 or not at all.
        cut_share: share of the responses whose connection is closed in the middle.
        status: answered to every request; 0 answers them.
        ranges: whether it sends parts of files.
        sends_etags: whether it sends an ETag with each file.
        login: "Basic ..." that every request needs.
        requests: the requests so far: method, path and range.
        on_request: called with the handler of each request; true if it has answered.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    do_POST = do_GET

    def respond(self, body: bool) -> None:
        server = self.server
        server.requests.append((self.command, self.path, self.headers.get("Range", "")))
        if server.on_request and server.on_request(self):
            return None
        if server.dice.random() < server.fail_share:
            if server.dice.random() < 0.5:
                return self.refuse(503)
            self.close_connection = True
            return None
        if server.status:
            return self.refuse(server.status)
        if server.login and self.headers.get("Authorization") != server.login:
            return self.refuse(401)
        file = Path(self.translate_path(self.path))
        if file.is_dir():
            return super().do_GET() if body else super().do_HEAD()
        if not file.is_file():
            return self.refuse(404)
        content, status = file.read_bytes(), 200
        self_tag = f'"{hashlib.md5(content + str(os.stat(file).st_mtime_ns).encode()).hexdigest()}"'
        size, start = len(content), 0
        if server.ranges and (given := self.headers.get("Range")):
            first, _, last = given.removeprefix("bytes=").partition("-")
            start, status = int(first), 206
            content = content[start : int(last) + 1 if last else size]
        self.send_response(status)
        if server.sends_etags:
            self.send_header("ETag", self_tag)
        self.send_header("Content-Length", str(len(content)))
        if status == 206:
            end = start + len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.end_headers()
        if not body:
            return None
        if content and server.dice.random() < server.cut_share:
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)
        return None

    def refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    """A server that says nothing about clients that close their connection."""

    daemon_threads = True

    def handle_error(self, *_) -> None:
        pass


@contextmanager
def http_server(folder: Path) -> Iterator[QuietServer]:
    """Serve a folder; `url` of the server has no slash at its end."""
    handler = partial(FaultyHandler, directory=str(folder))
    server = QuietServer(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.fail_share = server.cut_share = server.status = 0
    server.ranges, server.login, server.requests, server.on_request = True, "", [], None
    server.dice, server.sends_etags = random.Random(0), True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
