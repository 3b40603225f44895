"""What this machine has, and the small things every real process needs."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCAL = "127.0.0.1"


def lacking(what: str) -> NoReturn:
    """Skip visibly on somebody's laptop, fail where ``CI`` says that everything is there."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"CI has to have {what}")
    pytest.skip(f"no {what} on this machine")


def program(*names: str) -> str:
    """The path of the first of these programs that is installed; see ``lacking``."""
    for name in names:
        if path := shutil.which(name):
            return path
    lacking(names[0])


def self_signed(directory: Path, *names: str) -> tuple[str, str]:
    """A certificate for these names (``IP:127.0.0.1``, ``DNS:example.test``), and its key: two paths."""
    made, key = directory / "certificate.pem", directory / "key.pem"
    command = [program("openssl"), "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=asgi-cluster"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-addext", f"subjectAltName={','.join(names)}", "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return str(made), str(key)


def _die_with_parent() -> Callable[[], None] | None:
    # Linux ties the signal to the *thread* that forked: with a worker thread the child would die too.
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGKILL) and None  # PR_SET_PDEATHSIG


def spawn(
    command: Sequence[str],
    *,
    log: IO[bytes] | int,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process that ends with us even when we are killed."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
        cwd=cwd,
        preexec_fn=_die_with_parent(),
    )


def end(process: subprocess.Popen[bytes], *, patience: float = 5.0) -> int:
    """SIGTERM, and SIGKILL for one that does not go; the exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()
