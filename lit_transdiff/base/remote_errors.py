"""Errors of files at URLs: which may pass, and each in one line that names the place and the way on."""

from __future__ import annotations


class RemoteError(OSError):
    """A place that cannot be reached, read or written, in one line."""


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error, if there is one."""
    status = getattr(error, "status", getattr(getattr(error, "response", None), "status_code", None))
    return status if isinstance(status, int) else None


def is_final(error: Exception) -> bool:
    """Whether another attempt would end in the same error."""
    if (status := http_status(error)) is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    lasting = (FileNotFoundError, PermissionError, ValueError, TypeError, AttributeError)
    return isinstance(error, lasting) or lacks_credentials(error)


def lacks_credentials(error: Exception) -> bool:
    return "credential" in f"{type(error).__name__} {error}".lower()


def explained(error: Exception, where: str, attempts: int) -> OSError:
    """The error in one line that names the place and the way on."""
    said = one_line(error)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{where}: no such file ({said})")
    if lacks_credentials(error):
        return RemoteError(
            f"{where}: {said}. Give credentials as the service expects them (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE; gcloud auth; HF_TOKEN), or for a public bucket "
            "FSSPEC_S3_ANON=true."
        )
    if isinstance(error, PermissionError) or http_status(error) in (401, 403):
        return RemoteError(
            f"{where}: access refused ({said}). Check the credentials and the bucket's policy."
        )
    tries = f" after {attempts} attempts" if attempts > 1 else ""
    return RemoteError(f"{where}: failed{tries}: {said}")


def one_line(error: BaseException) -> str:
    """An error's text, or its kind if it says nothing, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
