"""An S3 server of this process behind a proxy that fails as networks do; it serves http:// as well."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections import defaultdict
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lit_transdiff.base.remote import RemoteFolder

SIGNED = "AWS4-HMAC-SHA256 Credential=someone/20260101/us-east-1/s3/aws4_request"
HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")


class Bucket:
    """The server and its proxy. ``faults[part of a path]`` are what happens to the next requests of it:

    ``drop`` (no answer), ``truncate`` (half an answer), ``damage`` (other bytes), ``whole`` (the file in
    place of a range), ``hang`` (an answer after ``delay`` seconds), ``trickle`` (a byte each ``delay``
    seconds), or a status such as ``503``.
    """

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str]] = []  # method, path
        self.delay, self.lock = 0.0, threading.Lock()
        upstream, outer = self.server.get_host_and_port(), self

        class Proxy(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = outer.next_fault(self.command, self.path)
                if fault == "drop":
                    self.close_connection = True
                    return
                if fault == "hang":
                    time.sleep(outer.delay)
                if fault.isdigit():
                    return self.send_error(int(fault))
                connection = http.client.HTTPConnection(*upstream)
                headers = {"Authorization": SIGNED, **dict(self.headers.items())}  # plain HTTP has none
                headers.pop("Expect", None)
                if fault == "whole":
                    headers.pop("Range", None)
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                if fault == "damage":
                    content = bytes(255 - byte for byte in content)
                self.send_response(answer.status)
                length = answer.headers.get("Content-Length") if self.command == "HEAD" else len(content)
                for name, value in answer.headers.items():
                    if name.lower() not in HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                for i in range(len(content) if fault == "trickle" else 0):
                    self.wfile.write(content[i : i + 1])
                    time.sleep(outer.delay)
                self.wfile.write(
                    {"truncate": content[: len(content) // 2], "trickle": b""}.get(fault, content)
                )
                if fault == "truncate":
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

            def handle(self) -> None:
                with suppress(ConnectionError):
                    super().handle()

            def log_message(self, *_: object) -> None:
                pass

        self.proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        self.proxy.daemon_threads = True
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.http = f"http://127.0.0.1:{self.proxy.server_address[1]}"

    def next_fault(self, method: str, path: str) -> str:
        with self.lock:
            self.requests.append((method, path))
            for part, faults in self.faults.items():
                if part in path and faults:
                    return faults.pop(0)
        return ""

    def environment(self) -> dict[str, str]:
        """The variables by which clients find the server."""
        return {
            "AWS_ENDPOINT_URL": self.http,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def make(self, name: str) -> None:
        """Make an empty bucket."""
        connection = http.client.HTTPConnection(*self.server.get_host_and_port())
        connection.request("PUT", f"/{name}")
        assert connection.getresponse().status == 200


def upload(folder: Path, url: str) -> str:
    """Upload the files of a folder; the URL."""
    remote = RemoteFolder(url)
    for file in sorted(folder.iterdir()):
        remote.put(file, file.name)
    return url
