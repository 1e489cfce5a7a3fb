"""Exit codes and one-line messages for errors of commands; only bugs of the program end in a traceback.

The messages of libraries are shown only where a user can act on them.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings

from lit_transdiff.base.endings import CheckpointError, HubError, Preempted, RankFailed, TrialsFailed
from lit_transdiff.base.files import is_full
from lit_transdiff.base.remote_errors import RemoteError

QUIET = (  # loggers whose information does not help users; cuda logs LOCAL_RANK at every start of a Trainer
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
)
# A path that cannot be meant.
NAMES_OF_CODES = "EACCES EPERM ENOTDIR EISDIR EEXIST EROFS ENAMETOOLONG ELOOP"
NOT_HERE = {getattr(errno, name) for name in NAMES_OF_CODES.split()}
# Their message is the whole line.
FAILURES = (FloatingPointError, CheckpointError, HubError, TrialsFailed, RankFailed, RemoteError)
ENDINGS = (ValueError, OSError, Preempted, *FAILURES)  # the errors that ``status_of`` handles


def status_of(error: BaseException) -> int:
    """Print the line of one of ``ENDINGS`` to standard error and return its exit code."""
    status, line = ending_of(error)
    print(f"lit-transdiff: {line}", file=sys.stderr)
    return status


def told(error: BaseException) -> str:
    """The text of an error; of one in a data worker the last line, which comes after its traceback."""
    text = str(error)
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:
        return text.strip().splitlines()[-1].partition(": ")[2]
    return text


def ending_of(error: BaseException) -> tuple[int, str]:
    if isinstance(error, Preempted):
        return error.code, str(error)
    if isinstance(error, FAILURES):
        return 1, getattr(error, "strerror", None) or told(error)  # without the number of a CheckpointError
    if isinstance(error, ValueError | FileNotFoundError):
        return 2, told(error)
    assert isinstance(error, OSError)
    if is_full(error):
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        return 1, f"{what}. Make room, and start the same command again."
    if error.filename is not None:
        return 2 if error.errno in NOT_HERE else 1, f"{error.filename}: {error.strerror}"
    if isinstance(error, BrokenPipeError):  # no reader is left: Python would report it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1, f"{type(error).__name__}: {error}"  # an error of a connection or a process


def quiet_libraries() -> None:
    """Show our own messages, and of the libraries only warnings about problems that a user can solve."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("lit_transdiff").setLevel(logging.INFO)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "ZeRO with an untested optimizer" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", module="lightning")
    # DeepSpeed's calls
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is (deprecated|a private function)")
