"""Ends a child process together with the supervisor, with a pipe on its standard input.

The supervisor never writes to the pipe. When the supervisor ends, by any signal, the system closes its side
of the pipe, and the child reads the end of the file. That works for ``kill -9`` too, on Linux and on macOS.

``python -m demo.lifeline DIRECTORY COMMAND…`` runs a command that does not read such a pipe, in a directory
that the supervisor made. At the end of the pipe it ends the command and removes the directory.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["watch"]


def watch(ended: Callable[[], None]) -> None:
    """Call ``ended``, on another thread, when the supervisor has ended."""

    def wait() -> None:
        # os.read in place of sys.stdin: a daemon thread in a buffered read would keep its lock at exit.
        while os.read(0, 64):
            pass
        ended()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def main(directory: str, command: list[str]) -> int:
    """Run ``command`` until it ends, the pipe ends, or SIGTERM comes; returns its exit status, 128 more than
    the signal's number if a signal ended it.
    """
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, cwd=directory, preexec_fn=_die_with_this_process()
    )
    orphaned = threading.Event()

    def orphan() -> None:
        orphaned.set()
        child.terminate()

    def stop(number: int, frame: FrameType | None) -> None:
        child.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    watch(orphan)
    status = child.wait()
    if orphaned.is_set():
        shutil.rmtree(directory, ignore_errors=True)
    return status if status >= 0 else 128 - status


def _die_with_this_process() -> Callable[[], None] | None:
    """On Linux the command also ends after ``kill -9`` of this process, and does not keep its port."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGKILL) and None  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
