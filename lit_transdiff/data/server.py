"""Imported first by the server of data processes alone: signals that go to all processes of a job are the trainer's to hear.

The server ends with the process that started it, whose pipe it reads.
"""

import signal

from lit_transdiff.base.endings import STOP_SIGNALS

for number in STOP_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
