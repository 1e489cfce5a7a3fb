"""The Hugging Face Hub: ``hf://OWNER/NAME[@REVISION][/PATH]``, a repository there, or a file or folder in it.

``pinned`` finds the commit of such a place, and ``local`` its files in the Hub's own cache. huggingface_hub
is imported on first use, because that takes time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from lit_transdiff.base.endings import HubError
from lit_transdiff.base.files import CHECKSUMS, is_full, sha256_of

SCHEME = "hf://"
FORM = "hf://OWNER/NAME, hf://OWNER/NAME@REVISION or hf://OWNER/NAME@REVISION/PATH"
REPO_NAME = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
PLACE = re.compile(
    rf"hf://(?:(?P<kind>models|datasets)/)?(?P<repo>{REPO_NAME}/{REPO_NAME})"
    r"(?:@(?P<revision>refs/\w+/[^/@]+|[^/@]+))?(?:/(?P<path>[^@]*))?"
)
COMMIT = re.compile("[0-9a-f]{40}")
UPLOAD_PATIENCE = 60.0  # seconds for each answer during an upload, where the client itself would wait forever
KNOWN_BESIDE = ("export.json", CHECKSUMS)  # files with the checksums of those beside them
LOGIN = "hf auth login, or HF_TOKEN=..."
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubPlace:
    """A repository at a revision (None: its default branch), and a path in it (empty: all of it)."""

    repo: str
    revision: str | None = None
    path: str = ""
    kind: str = "model"

    def __str__(self) -> str:
        revision, path = f"@{self.revision}" if self.revision else "", f"/{self.path}" if self.path else ""
        return f"{SCHEME}{'datasets/' if self.kind == 'dataset' else ''}{self.repo}{revision}{path}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


def is_on_hub(place: object) -> bool:
    return isinstance(place, str) and place.startswith(SCHEME)


def hub_place(text: str, what: str = "place") -> HubPlace:
    """The place that a text names. Raises ``ValueError`` with ``what`` for any other form."""
    match = PLACE.fullmatch(text.rstrip("/"))
    steps = (match["path"] or "").split("/") if match else []
    if match is None or ".." in steps or "--" in match["repo"] or ".." in match["repo"]:
        raise ValueError(f"{what}: got {text!r}; allowed: {FORM}.")
    kind = "dataset" if match["kind"] == "datasets" else "model"
    return HubPlace(match["repo"], match["revision"], "/".join(filter(None, steps)), kind)


def pinned(place: str) -> str:
    """``place`` with the commit that its revision has now; any other path is returned unchanged.

    Without a connection it is the commit that the cache knows.
    """
    if not is_on_hub(place):
        return place
    at = hub_place(place)
    return str(at if at.is_pinned else replace(at, revision=commit_of(at)))


def commit_of(at: HubPlace) -> str:
    """The commit of a place's revision."""
    from huggingface_hub import HfApi

    with asking(at):
        revision = HfApi().resolve_revision(at.repo, repo_type=at.kind, revision=at.revision)
    return revision.resolved


def local(place: str | Path, files: Sequence[str] = ("*",)) -> Path:
    """The path of ``place`` on this machine.

    The ``files`` below a place on the Hub (patterns, in which ``*`` also matches ``/``) are downloaded to its
    cache, once on each machine. Raises ``ValueError`` for files that differ from the Hub's and if it refuses
    access, ``FileNotFoundError`` if they do not exist, and ``HubError`` if it does not answer.
    """
    if not is_on_hub(place):
        return Path(place)
    from huggingface_hub import get_cached_repo_tree

    at = hub_place(pinned(str(place)))
    patterns = [f"{at.path}/{name}".lstrip("/") for name in files]
    if at.path:
        patterns += [at.path, *(str(PurePosixPath(at.path).with_name(name)) for name in KNOWN_BESIDE)]
    folder = snapshot(at, patterns)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and any(fnmatch(name, pattern) for pattern in patterns):
            check_download(file, at)
    if not (folder / at.path).exists():
        entries = get_cached_repo_tree(at.repo, repo_type=at.kind, revision=at.revision)
        there = ", ".join(sorted({entry.path.split("/")[0] for entry in entries})[:8]) or "no files"
        raise FileNotFoundError(f"{place}: {at.repo} has no {at.path or ' or '.join(files)}; it has {there}.")
    return folder / at.path


def snapshot(at: HubPlace, patterns: Sequence[str]) -> Path:
    """The folder of a commit in the cache, with the files that fit the patterns.

    Of several processes on a machine one downloads, and the others wait for it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: dict[str, Any] = dict(repo_type=at.kind, revision=at.revision, allow_patterns=list(patterns))
    try:
        return Path(snapshot_download(at.repo, **asked, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    with asking(at), one_at_a_time(Path(constants.HF_HUB_CACHE), at):
        if not constants.is_offline_mode():  # the client answers only some refusals, and after long waits
            limit = constants.HF_HUB_ETAG_TIMEOUT
            HfApi().repo_info(at.repo, repo_type=at.kind, revision=at.revision, timeout=limit)
        return Path(snapshot_download(at.repo, **asked))


@contextmanager
def one_at_a_time(cache: Path, at: HubPlace) -> Iterator[None]:
    """Let one process of this machine at a time download from a repository."""
    from filelock import FileLock

    file = cache / ".locks" / f"lit-transdiff-{at.kind}-{at.repo.replace('/', '--')}.lock"
    held: Any = nullcontext()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(file).acquire()
    except OSError as error:  # a disk without locks, or a cache that is only read
        log.warning("%s: no lock there (%s): several processes may download %s", cache, error, at)
    with held:
        yield


def check_download(file: Path, at: HubPlace) -> None:
    """Raise ``ValueError`` if a file of the cache differs from the Hub's, whose hash is the link's target."""
    if not file.is_symlink():  # a disk without links
        return
    stat, known = file.stat(), Path(os.readlink(file)).name
    if not is_intact(file.resolve(), known, stat.st_size, stat.st_mtime_ns):
        raise ValueError(
            f"{at}: {file} is damaged: it differs from the file on the Hub. Remove {file.resolve()}, and "
            "start the same command again: it is downloaded again."
        )


@lru_cache(maxsize=4096)
def is_intact(file: Path, known: str, size: int, modified: int) -> bool:
    """Whether a file has a hash: a SHA-256, or git's SHA-1 of small files. Each is read once per process."""
    if re.fullmatch("[0-9a-f]{64}", known):
        return sha256_of(file) == known
    if COMMIT.fullmatch(known):
        return hashlib.sha1(b"blob %d\0" % size + file.read_bytes()).hexdigest() == known
    return True


@contextmanager
def asking(at: HubPlace, patience: float | None = None) -> Iterator[None]:
    """Bound the wait for every answer of the Hub in the block, and turn the client's errors into one line.

    ``patience`` is in seconds; by default it is HF_HUB_ETAG_TIMEOUT.
    """
    from huggingface_hub import constants, get_session

    session, limit = get_session(), patience or constants.HF_HUB_ETAG_TIMEOUT
    before = session.event_hooks
    session.event_hooks = {**before, "request": [*before["request"], partial(bounded, limit)]}
    try:
        yield
    except Exception as error:
        told = in_our_words(error, at)
        if told is None:
            raise
        raise told from error
    finally:
        session.event_hooks = before


def bounded(limit: float, request: Any) -> None:
    """Give a request of the client the time limits that it lacks, in seconds."""
    limits = request.extensions.setdefault("timeout", {})
    for name in ("connect", "read", "write", "pool"):
        limits[name] = limit if limits.get(name) is None else limits[name]


def in_our_words(error: BaseException, at: HubPlace) -> Exception | None:
    """An error of the client in our words; None for one of another kind."""
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, OSError) and error.filename is not None:  # an error of this machine's files
        return None
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    token = get_token()
    refused = "the token that is used is not allowed to" if token else f"you are not logged in ({LOGIN})"
    for one in causes:
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(one, errors.OfflineModeIsEnabled):
            return FileNotFoundError(
                f"{at} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to download "
                f"it. Unset that, or fetch it where there is a network: hf download {at.repo}"
            )
        if isinstance(one, errors.RevisionNotFoundError):
            return FileNotFoundError(
                f"{at}: {at.repo} has no branch, tag or commit {at.revision or 'main'!r}."
            )
        if isinstance(one, errors.GatedRepoError):
            where = f"{constants.ENDPOINT}/{at.repo}"
            return ValueError(f"{at}: access is to be asked for at {where}, and {refused}.")
        if isinstance(one, errors.RepositoryNotFoundError):
            return FileNotFoundError(
                f"{at}: there is no repository {at.repo}, or it is private and {refused}."
            )
        if status == 401:
            return ValueError(f"{at}: {f'the token is not valid ({LOGIN})' if token else refused}.")
        if status == 403:
            return ValueError(f"{at}: {refused}: {answer_of(one)}")
        if status is not None:
            return HubError(
                f"{at}: {constants.ENDPOINT} answers {status}: {answer_of(one)}. Try again later."
            )
        if type(one).__module__.startswith(("httpx", "httpcore")):
            text = f"does not answer ({type(one).__name__}: {one})"
            return HubError(
                f"{at}: {constants.ENDPOINT} {text}. Try again, or see HF_ENDPOINT and your proxy."
            )
    if isinstance(error, OSError | RuntimeError) and not is_full(error):
        return HubError(f"{at}: {' '.join(str(error).split())}")
    return None


def answer_of(error: Any) -> str:
    """The server's own words for a refusal, in one line."""
    return " ".join(str(getattr(error, "server_message", None) or error).split())[:200]
