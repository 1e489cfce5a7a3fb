"""A Hugging Face Hub in memory, for tests with the real client: repositories, commits, branches and a token.

It answers what huggingface_hub asks to create a repository, to upload to it (small files in the commit,
others as LFS), to list it and to download from it. Other questions are kept in ``unknown`` and refused, so
that an update of the client fails loudly.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

LARGE = 10_000  # bytes; larger files, and safetensors, are uploaded as LFS
TOKEN = "hf_" + "a" * 34
FOLDERS = {"model": "", "dataset": "datasets/"}
Files = dict[str, bytes]


def sha1_of(content: bytes) -> str:
    """Git's name of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, content: bytes) -> bool:
    return len(content) > LARGE or path.endswith(".safetensors")


@dataclass
class Repo:
    """A repository: the files of each commit, and the commit of each branch."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str = "main") -> str:
        """Make ``files`` the whole content of a branch; returns the commit."""
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def sha_of(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    @property
    def files(self) -> Files:
        return self.commits[self.branches["main"]]


class Handler(BaseHTTPRequestHandler):
    """One connection of the client."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        """Tests want no access log."""

    def send(self, content: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer(self, data: Any, status: int = 200) -> None:
        self.send(json.dumps(data).encode(), status, Content_Type="application/json")

    def refuse(self, status: int, code: str, message: str) -> None:
        content = json.dumps({"error": message}).encode()
        self.send(content, status, X_Error_Code=code, X_Error_Message=message)

    def handle_any(self) -> None:
        """Choose the answer by method and path."""
        hub, body = self.server.hub, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        trouble = hub.trouble
        if trouble is not None and not path.startswith("/lfs"):
            if trouble:
                return self.refuse(trouble, "", "in trouble")
            while hub.trouble == 0:
                time.sleep(0.02)
            self.close_connection = True
            return
        with hub.lock:
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command.replace("HEAD", "GET"):
                    return function(self, body, **match.groupdict())
            hub.unknown.append(f"{self.command} {path}")
            self.answer({"error": "the stub does not know this"}, 418)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    # repositories

    @property
    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, id: str, kind: str = "model") -> Repo | None:
        """A repository that the token may see; else refuse it."""
        repo = self.server.hub.repos.get((kind, id))
        if repo is None or (repo.private and not self.may_write):
            self.refuse(404 if self.may_write else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def commit_of(self, id: str, kind: str, revision: str) -> tuple[Repo, str] | None:
        """A repository and one of its commits; else refuse them."""
        if (repo := self.repo(id, kind)) is None:
            return None
        sha = repo.sha_of(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, sha

    def whoami(self, body: bytes) -> None:
        if not self.may_write:
            return self.refuse(401, "", "Invalid username or password.")
        token = {"displayName": "lab", "role": "write"}
        self.answer({"name": "lab", "type": "user", "orgs": [], "auth": {"accessToken": token}})

    def create(self, body: bytes) -> None:
        if not self.may_write:
            return self.refuse(401, "", "Invalid username or password.")
        asked = json.loads(body)
        id = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            return self.refuse(403, "", "You don't have the rights to create a model under this namespace")
        repos, key = self.server.hub.repos, (asked.get("type", "model"), id)
        if key in repos:
            return self.answer({"error": "You already created this model repo", "url": self.url(id)}, 409)
        repos[key] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repos[key].commit({".gitattributes": b"*.safetensors filter=lfs"})
        self.answer({"url": self.url(id), "name": id, "id": id})

    def url(self, id: str) -> str:
        return f"http://{self.headers['Host']}/{id}"

    def info(self, body: bytes, kind: str, id: str, revision: str = "main") -> None:
        if (found := self.commit_of(id, kind, revision)) is None:
            return
        repo, sha = found
        siblings = [{"rfilename": name} for name in repo.commits[sha]]
        self.answer(
            dict(id=id, sha=sha, private=repo.private, siblings=siblings, tags=[], downloads=0, likes=0)
        )

    def tree(self, body: bytes, kind: str, id: str, revision: str, folder: str = "") -> None:
        """The files below a folder, or the files and folders in it."""
        if (found := self.commit_of(id, kind, revision)) is None:
            return
        repo, sha = found
        inside, whole = f"{folder}/" if folder else "", "recursive=false" not in self.path.lower()
        below = {name for name in repo.commits[sha] if name.startswith(inside)}
        if folder and not below:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist")
        shown = {name if whole else inside + name.removeprefix(inside).split("/")[0] for name in below}
        self.answer([self.entry(repo.commits[sha], name) for name in sorted(shown)])

    @staticmethod
    def entry(files: Files, name: str) -> dict[str, Any]:
        """A file or folder in a tree."""
        if name not in files:
            return dict(type="directory", path=name, oid=sha1_of(name.encode()), size=0)
        content = files[name]
        entry: dict[str, Any] = dict(type="file", path=name, size=len(content), oid=sha1_of(content))
        if is_lfs(name, content):
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = dict(oid=oid, size=len(content), pointerSize=130)
        return entry

    def branch(self, body: bytes, kind: str, id: str, branch: str) -> None:
        if (repo := self.repo(id, kind)) is not None:
            if branch in repo.branches:
                return self.refuse(409, "", f"Reference already exists: {branch}")
            repo.branches[branch] = repo.branches["main"]
            self.answer({})

    # uploads

    def preupload(self, body: bytes, kind: str, id: str, revision: str) -> None:
        if self.commit_of(id, kind, revision) is None:
            return
        if not self.may_write:
            return self.refuse(403, "", "You may not write here")
        files = [
            dict(
                path=file["path"],
                shouldIgnore=False,
                uploadMode="lfs" if is_lfs(file["path"], b" " * size) else "regular",
            )
            for file in json.loads(body)["files"]
            for size in [file["size"]]
        ]
        self.answer({"files": files})

    def batch(self, body: bytes, id: str) -> None:
        upload = lambda oid: {"upload": {"href": f"http://{self.headers['Host']}/lfs/{oid}"}}  # noqa: E731
        objects = [item | {"actions": upload(item["oid"])} for item in json.loads(body)["objects"]]
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.hub.lfs[oid] = body
        self.send()

    def commit(self, body: bytes, kind: str, id: str, revision: str) -> None:
        if (found := self.commit_of(id, kind, revision)) is None:
            return
        repo, sha = found
        files = dict(repo.commits[sha])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        new = repo.commit(files, revision)
        self.answer(
            dict(success=True, commitOid=new, commitUrl=f"{self.url(id)}/commit/{new}", hookOutput="")
        )

    def validate(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self.answer({"errors": [], "warnings": []})

    # downloads

    def resolve(self, body: bytes, folder: str, id: str, revision: str, name: str) -> None:
        kind = "dataset" if folder else "model"
        if (found := self.commit_of(id, kind, revision)) is None:
            return
        repo, sha = found
        content = repo.commits[sha].get(name)
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha256(content).hexdigest() if is_lfs(name, content) else sha1_of(content)
        given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        hub = self.server.hub
        if self.command == "GET":
            hub.downloads.append(name)
        sent = content[int(given[1]) : int(given[2]) + 1 if given[2] else None] if given else content
        self.send(
            hub.spoil(sent) if self.command == "GET" else sent,
            206 if given else 200,
            ETag=f'"{etag}"',
            X_Repo_Commit=sha,
            Accept_Ranges="bytes",
        )


API = r"/api/(?P<kind>model|dataset)s/(?P<id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/agent-harnesses", lambda handler, body: handler.answer({})),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", API, Handler.info),
    ("GET", rf"{API}/revision/(?P<revision>.+)", Handler.info),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", Handler.tree),
    ("POST", rf"{API}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", rf"{API}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"{API}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.put),
    (
        "GET",
        r"/(?P<folder>(datasets/)?)(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)",
        Handler.resolve,
    ),
]


class Server(ThreadingHTTPServer):
    """A server whose threads end with the process."""

    daemon_threads = True
    hub: HubStub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client drops its connections when it ends."""


class HubStub:
    """``with HubStub() as hub``: a server with its repositories."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: Files = {}
        self.requests: list[str] = []
        self.downloads: list[str] = []
        self.unknown: list[str] = []
        self.trouble: int | None = None  # the status of every answer; 0: take it and say nothing
        self.spoil = lambda content: content  # what is done to downloads
        self.lock = threading.Lock()
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def __enter__(self) -> HubStub:
        return self

    def __exit__(self, *error: object) -> None:
        self.trouble = None
        self.server.shutdown()
        self.server.server_close()

    def add(self, id: str, files: Files, kind: str = "model", private: bool = False) -> str:
        """A repository with files, or a new commit of it; returns the commit."""
        return self.repos.setdefault((kind, id), Repo(private)).commit(files)

    def environment(self, cache: Any, token: str | None = TOKEN) -> dict[str, str]:
        """The environment that points a client to this server and to a cache of its own."""
        given = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        return (
            given
            | {"HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
            | ({"HF_TOKEN": token} if token else {})
        )

    def used_by(self, monkeypatch: pytest.MonkeyPatch, cache: Any, token: str | None = TOKEN) -> None:
        """Point the client of this process, which has read the environment already, to this server."""
        from huggingface_hub import constants, hf_api

        known = {"ENDPOINT": self.endpoint, "HF_HUB_CACHE": f"{cache}/hub", "HF_HUB_DISABLE_XET": True}
        known |= {"HF_HUB_ETAG_TIMEOUT": 10, "HF_HUB_DOWNLOAD_TIMEOUT": 10, "HF_HUB_OFFLINE": False}
        known |= {"HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"}
        for name, value in (known | {"HF_TOKEN_PATH": f"{cache}/token"}).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
