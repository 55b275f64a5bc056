"""Ends engines whose parent was killed: they would keep their memory, of the host or of a GPU, for ever."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

# Runs in a process of its own, for a killed process does nothing any more. It holds the engines by file descriptor, so
# that another process that gets one of their numbers later is safe.
_WATCH = """
import os, select, signal, sys

engines = []
for number in sys.argv[1:]:
    try:
        engines.append(os.pidfd_open(int(number)))
    except OSError:  # it is gone already, or the kernel has no such descriptors
        pass
if sys.stdin.readline() != "":
    sys.exit()
for sent, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 0)):
    for engine in engines:
        try:
            signal.pidfd_send_signal(engine, sent)
        except OSError:
            pass
    engines = [engine for engine in engines if not select.select([engine], [], [], patience)[0]]
"""


class OrphanWatch:
    """Ends processes when this one has ended without `stop`, were it by SIGKILL. Does nothing outside Linux.

    Args:
        processes: their numbers. They are to be running: one that is forked later keeps the watch from noticing the end
            of this process, until it has ended as well.
    """

    def __init__(self, processes: Sequence[int]) -> None:
        self._watch: subprocess.Popen[bytes] | None = None
        if sys.platform == "linux" and processes:
            # In a session of its own: Ctrl-C in a terminal is for those it watches, not for the watch.
            self._watch = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", _WATCH, *map(str, processes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Let the processes go."""
        if self._watch is not None:
            self._watch.communicate(b"stop\n")
            self._watch = None
