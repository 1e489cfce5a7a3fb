"""Imported first by the server of data processes: it ignores signals that are sent to all processes of a job.

The server ends with the process that started it, whose pipe it reads.
"""

import signal

from lit_transdiff.base.endings import STOP_SIGNALS

for number in STOP_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
