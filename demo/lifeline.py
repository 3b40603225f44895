"""What ties a child process to the supervisor: a pipe on its standard input.

The supervisor never writes to it. When it ends, by whatever signal, the system closes its end, and the
child sees the end of the file. That works for ``kill -9`` too, on Linux and macOS alike.

``python -m demo.lifeline COMMAND…`` runs a command that knows nothing of this, in an empty directory that
goes with it, and ends it when the pipe ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["watch"]


def watch(ended: Callable[[], None]) -> None:
    """Call ``ended``, on another thread, when the supervisor is gone."""

    def wait() -> None:
        # os.read and not sys.stdin: a daemon thread inside a buffered read would hold its lock at exit.
        while os.read(0, 64):
            pass
        ended()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def main(command: list[str]) -> int:
    """Run ``command`` until it ends, the pipe ends, or SIGTERM comes; returns its exit status."""
    with tempfile.TemporaryDirectory(prefix="asgi-cluster-demo-", ignore_cleanup_errors=True) as directory:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=directory)

        def stop(number: int, frame: FrameType | None) -> None:
            child.terminate()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        watch(child.terminate)
        return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
