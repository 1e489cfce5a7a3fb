"""Files at URLs (``s3://``, ``gs://``, ``hf://``, ``http(s)://`` and others that fsspec knows): the one door.

Each request has a time limit and is repeated after growing pauses, except where another answer cannot be
expected. Addresses of servers, profiles and anonymous access are settings of fsspec and of its packages, as
in ``AWS_PROFILE``, ``AWS_ENDPOINT_URL`` and ``FSSPEC_S3_ANON``.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout  # not yet the built-in one in Python 3.10
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from lit_transdiff.base.files import whole
from lit_transdiff.base.remote_errors import explained, http_status, is_final, one_line

Reply = TypeVar("Reply")
ATTEMPTS = 5
REQUEST_PAUSE = 0.5  # seconds before the second attempt, doubled before each further one
REQUEST_LIMIT = 60.0  # seconds for a request of at most REQUEST_BYTES bytes
SLOWEST = 1e6  # bytes per second, at which a larger upload still succeeds
REQUEST_BYTES = 8 << 20
THREADS = 16  # for many small requests
# The packages, by their names for pip, with which fsspec reads a scheme.
SCHEMES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "az": "adlfs",
    "abfs": "adlfs",
}
# Attempts are counted here, and a range of a file on the Hub is read without the megabytes behind it.
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}},
    "hf": {"block_size": 1},
}
log = logging.getLogger(__name__)


def is_remote(place: object) -> bool:
    """Whether a place is a URL instead of a path; a ``pipe:`` command is neither."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(place)) is not None


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL, and the path there. ``ValueError`` if no installed package reads it."""
    import fsspec

    scheme = url.partition("://")[0] if is_remote(url) else "file"
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **OPTIONS.get(scheme, {}))
    except ImportError as error:
        package = SCHEMES.get(scheme, f"the package that fsspec reads {scheme}:// with")
        raise ValueError(f"{url}: {scheme}:// needs a package: pip install {package} ({error})") from error
    except ValueError as error:
        if scheme in fsspec.registry or scheme in fsspec.available_protocols():
            raise ValueError(f"{url}: {one_line(error)}") from error
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"{url}: got {scheme!r}; allowed: a folder, or a URL of {known}.") from error
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1
    return filesystem, str(path).rstrip("/")


class RemoteFolder:
    """A folder at a URL (or a local path): reading, writing and listing, with limits of time and repetition.

    Every method raises ``FileNotFoundError`` for a missing file or bucket, and ``RemoteError`` for anything
    else.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}  # other processes connect themselves

    @cached_property
    def opened(self) -> tuple[Any, str]:
        return filesystem_of(self.url)

    def is_on(self, *schemes: str) -> bool:
        return self.url.partition("://")[0] in schemes

    def at(self, *parts: str) -> RemoteFolder:
        """A folder in this one."""
        return RemoteFolder("/".join([self.url, *parts]))

    def call(self, method: str, name: str, *arguments: Any, **options: Any) -> Any:
        """One attempt to call a method of the filesystem for the file ``name``; "" is the folder."""
        filesystem, root = self.opened
        place = f"{root}/{name}".rstrip("/")
        return within_limit(filesystem, method, REQUEST_LIMIT, place, *arguments, **options)

    def repeated(self, act: Callable[[], Reply], name: str) -> Reply:
        """The result of ``act``, which is repeated after errors that may pass."""
        where = f"{self.url}/{name}" if name else self.url
        _ = self.opened  # raises its own errors
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return act()
            except Exception as error:
                if is_final(error) or attempt == ATTEMPTS:
                    raise explained(error, where, attempt) from error
                log.info("%s: %s; attempt %d of %d", where, one_line(error), attempt + 1, ATTEMPTS)
            time.sleep(REQUEST_PAUSE * 2 ** (attempt - 1) * random.SystemRandom().uniform(1, 1.5))
        raise AssertionError

    def read(self, name: str) -> bytes:
        """A whole file, a large one in parts."""
        size = self.size(name)
        if size is not None and size > REQUEST_BYTES:
            return b"".join(self.chunks(name, size))
        return bytes(self.repeated(lambda: self.call("cat_file", name), name))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Exactly the bytes [start, stop) of a file."""
        content = self.answer(name, start, stop)
        return content if len(content) == stop - start else content[start:stop]

    def answer(self, name: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file, or all of it from a server that ignores ranges."""

        def once() -> bytes:
            content = bytes(self.call("cat_file", name, start=start, end=stop))
            if len(content) != stop - start and len(content) < stop:
                raise EOFError(f"{len(content)} of {stop - start} bytes at {start}: truncated")
            return content

        return self.repeated(once, name)

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """The ``size`` bytes of a file in parts; a broken connection costs only a part."""
        for start in range(0, size, REQUEST_BYTES):
            stop = min(start + REQUEST_BYTES, size)
            content = self.answer(name, start, stop)
            if start == 0 and len(content) == size:
                yield content
                return
            yield content if len(content) == stop - start else content[start:stop]

    def sizes(self, names: Sequence[str]) -> dict[str, int | None]:
        """The sizes of files of this folder, None if the server does not say; missing files are left out."""
        filesystem, _ = self.opened
        if self.is_on("http", "https"):  # without a list of files
            with ThreadPoolExecutor(THREADS) as threads:
                found = dict(zip(names, threads.map(self.size, names), strict=True))
            return {name: size for name, size in found.items() if size != -1}
        filesystem.invalidate_cache()
        entries = self.repeated(lambda: self.call("ls", "", detail=True), "")
        listed = {entry["name"].rpartition("/")[2]: entry.get("size") for entry in entries}
        return {name: listed[name] for name in names if name in listed}

    def size(self, name: str) -> int | None:
        """The size of a file; -1 if it is missing, None if the server does not say."""

        def once() -> Any:
            try:
                return self.call("info", name)
            except FileNotFoundError as error:  # over HTTP so is every error
                cause = error.__cause__
                if self.is_on("http", "https") and isinstance(cause, Exception) and http_status(cause) != 404:
                    raise cause from None
                raise

        try:
            info = self.repeated(once, name)
        except FileNotFoundError:
            return -1
        return None if info.get("size") is None else int(info["size"])

    def files(self) -> dict[str, int]:
        """The sizes of all files below this folder, by relative name; {} if it does not exist."""
        filesystem, root = self.opened
        filesystem.invalidate_cache()
        try:
            found = self.repeated(lambda: self.call("find", "", detail=True), "")
        except FileNotFoundError:
            return {}
        inside = root.lstrip("/") + "/"
        entries = {place.lstrip("/"): int(info["size"]) for place, info in found.items()}
        return {
            place.removeprefix(inside): size
            for place, size in entries.items()
            if place.startswith(inside) and place != inside
        }

    def fetch(self, name: str, size: int, path: Path) -> None:
        """Download a file of this size to ``path``, completely or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial, partial.open("wb") as file:
            for content in self.chunks(name, size):
                file.write(content)

    def put(self, file: Path, name: str) -> None:
        """Upload a file; it appears there when it is complete."""
        filesystem, root = self.opened
        if "file" in filesystem.protocol:
            place = Path(root, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            with whole(place) as partial:
                shutil.copyfile(file, partial)
            return
        limit = REQUEST_LIMIT + file.stat().st_size / SLOWEST
        self.repeated(lambda: within_limit(filesystem, "put_file", limit, str(file), f"{root}/{name}"), name)

    def write(self, name: str, content: bytes) -> None:
        """Upload a small file with this content."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "file")
            file.write_bytes(content)
            self.put(file, name)

    def replace(self, name: str, content: bytes, tag: str | None) -> None:
        """Write a small file if its tag is still this one (None: if it does not exist yet).

        Only S3 compares tags; other services write in any case. Reading the file again shows the outcome.
        """
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}

        def once() -> bool:
            try:
                self.call("pipe_file", name, content, **condition)
            except FileNotFoundError:
                if tag is None:  # the bucket itself
                    raise
            except FileExistsError:
                pass
            except Exception as error:
                number = getattr(error, "errno", None)
                # a client before 2025, or a service, that knows no conditions
                lacks = type(error).__name__ == "ParamValidationError" or number == errno.ENOSYS
                if not lacks and number != errno.EINVAL:  # EINVAL says that the tag is another
                    raise
                return lacks
            return False

        if not self.is_on("s3") or self.repeated(once, name):
            self.write(name, content)

    def tag(self, name: str) -> str | None:
        """The service's hash of the content of a file; None without such a service."""
        self.opened[0].invalidate_cache()
        return self.repeated(lambda: self.call("info", name), name).get("ETag")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        try:
            self.repeated(lambda: self.call("rm_file", name), name)
        except FileNotFoundError:
            return


def within_limit(filesystem: Any, method: str, seconds: float, *arguments: Any, **options: Any) -> Any:
    """Call a method of a filesystem. ``TimeoutError`` unless its answer is complete after so many seconds."""
    from fsspec.asyn import sync
    from fsspec.exceptions import FSTimeoutError

    if "file" in filesystem.protocol:
        return getattr(filesystem, method)(*arguments, **options)
    try:
        if getattr(filesystem, "async_impl", False):
            function = getattr(filesystem, f"_{method}")
            return sync(filesystem.loop, function, *arguments, timeout=seconds, **options)
        return in_thread(partial(getattr(filesystem, method), *arguments, **options)).result(seconds)
    except (FSTimeoutError, FutureTimeout) as error:
        raise TimeoutError(f"no complete answer within {seconds:g} s") from error


def in_thread(act: Callable[[], Reply]) -> Future[Reply]:
    """The result of ``act``, computed in a thread that nobody has to wait for."""
    future: Future[Reply] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="request").start()
    return future
