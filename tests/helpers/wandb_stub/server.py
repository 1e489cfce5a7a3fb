"""The stub's HTTP server: GraphQL, the file stream of a run, and uploads."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.helpers.wandb_stub.operations import Operations, Refused
from tests.helpers.wandb_stub.state import State, now

STREAMS = {"wandb-history.jsonl": "history", "wandb-events.jsonl": "events"}


class Handler(BaseHTTPRequestHandler):
    """One connection of the client."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        """Tests want no access log."""

    def body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def send(self, content: bytes, status: int = 200) -> None:
        if self.server.dead:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, data: Any, status: int = 200) -> None:
        self.send(json.dumps(data).encode(), status)

    @property
    def place(self) -> str:
        return urllib.parse.unquote(self.path.split("?")[0])

    def do_GET(self) -> None:
        if self.server.trouble is not None:
            return self.in_trouble(self.server.trouble)
        found = self.server.state.files.get(self.place)
        if found is None:
            return self.answer({"error": "not found"}, 404)
        self.send(found)

    def do_PUT(self) -> None:
        content = self.body()
        if not self.server.dead:
            self.server.state.files[self.place] = content
        self.answer({})

    def do_POST(self) -> None:
        content = self.body()
        if self.server.dead:
            return self.send(b"")
        if self.server.trouble is not None:
            return self.in_trouble(self.server.trouble)
        with self.server.state.lock:
            if self.path.endswith("/file_stream"):
                shared = self.headers.get("X-WANDB-USE-ASYNC-FILESTREAM") == "true"
                self.answer(self.file_stream(json.loads(content), shared))
            elif self.path.endswith("/graphql"):
                self.answer(self.graphql(json.loads(content)))
            else:
                self.answer({}, 404)

    def in_trouble(self, status: int) -> None:
        """Answer every question with ``status``; with 0 take it and say nothing."""
        if status:
            return self.answer({"errors": [{"message": "in trouble"}]}, status)
        while not self.server.dead and self.server.trouble == 0:
            time.sleep(0.05)
        self.close_connection = True

    def graphql(self, query: dict[str, Any]) -> dict[str, Any]:
        """Choose the answer by the operation's name."""
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", query["query"])
        name = found.group(1) if found else "(no name)"
        state = self.server.state
        state.operations[name] += 1
        method = getattr(Operations(state, f"http://{self.headers['Host']}", query["query"]), name, None)
        if method is None:
            state.unknown.append(f"{name} {json.dumps(query.get('variables'))[:300]}")
            return {"data": None, "errors": [{"message": f"the stub knows no operation {name}"}]}
        try:
            return {"data": method(query.get("variables") or {})}
        except Refused as error:
            return {"data": None, "errors": [{"message": str(error)}]}
        except (KeyError, TypeError, ValueError) as error:
            state.unknown.append(f"{name} {json.dumps(query.get('variables'))[:300]}: {error!r}")
            return {"data": None, "errors": [{"message": f"{name}: {error!r}"}]}

    def file_stream(self, sent: dict[str, Any], shared: bool) -> dict[str, Any]:
        """Take rows of a run's history, summary and output; of a ``shared`` run from several clients."""
        _, _, _, project, name, _ = self.path.split("/")
        run = self.server.state.run(project, name)
        run["heartbeatAt"] = now()
        for file, part in (sent.get("files") or {}).items():
            lines = part["content"]
            if file in STREAMS:
                rows = run[STREAMS[file]]
                # several clients count their lines independently
                rows[len(rows) if shared else part["offset"] :] = [
                    json.loads(line, parse_constant=str) for line in lines
                ]
            elif file == "wandb-summary.json":
                run["summary"] = json.loads(lines[-1], parse_constant=str)
            else:
                run["log"][part["offset"] :] = lines
        run["preempting"] |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run["exitcode"] = sent.get("exitcode")
            failed = "preempted" if run["preempting"] else "failed"
            run["state"], run["preempting"] = (failed if sent.get("exitcode") else "finished"), False
        else:
            run["state"] = "running"
        return {"exitcode": None, "limits": {}} | ({"stopped": True} if run["stopped"] else {})


class Server(ThreadingHTTPServer):
    """A server whose open connections also fall silent when it dies."""

    daemon_threads = True

    def __init__(self, state: State, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.state = state
        self.dead = False
        self.trouble: int | None = None  # the status of every answer; 0: there is none

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client drops its connections when it ends."""


class Stub:
    """``with Stub() as stub``: a server with its state; ``die()`` is a machine that is switched off."""

    def __init__(self, port: int = 0) -> None:
        self.state = State()
        self.server = Server(self.state, port)
        self.port = self.server.server_address[1]
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *error: object) -> None:
        self.die()

    def die(self) -> None:
        """Stop answering, also on open connections, and close the port."""
        if not self.server.dead:
            self.server.dead = True
            self.server.shutdown()
            self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that point the client to this server."""
        return {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self.port}",
            "WANDB_API_KEY": "local" + "0" * 40,
            "WANDB_MODE": "online",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
        }
