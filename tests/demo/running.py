"""A running demo, as a person would start it."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.machine import LOCAL, ROOT, end


@dataclass(eq=False)
class Demo:
    """``python -m demo`` with its nodes on the ports after ``port``."""

    process: subprocess.Popen[bytes]
    port: int
    nodes: int
    log_path: Path

    @property
    def url(self) -> str:
        """The shared address: any node answers."""
        return f"http://{LOCAL}:{self.port}"

    def node_url(self, number: int) -> str:
        """The address of one node, counted from 1."""
        return f"http://{LOCAL}:{self.port + number}"

    def node_pid(self, number: int) -> int:
        """The process that serves a node."""
        (found,) = [
            child.pid
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if f"node-{number}" in child.cmdline()
        ]
        return int(found)

    def valkey(self) -> psutil.Process:
        """The embedded server."""
        (found,) = [each for each in self.family() if "valkey" in each.name()]
        return found

    def directory(self) -> Path:
        """Where the embedded server has its data."""
        return Path(self.valkey().cwd())

    def family(self) -> list[psutil.Process]:
        """The supervisor and all that it started."""
        supervisor = psutil.Process(self.process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


def row_of_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, below those that the system hands out by itself."""
    for _ in range(200):
        first = random.randrange(20_000, 32_000 - count)
        probes: list[socket.socket] = []
        try:
            probes.extend(socket.create_server((LOCAL, port)) for port in range(first, first + count))
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
        return first
    raise AssertionError("no free ports in a row")


@contextmanager
def start_demo(*, nodes: int = 3) -> Iterator[Demo]:
    """Start the demo with a Valkey of its own; returns when it says where it is."""
    port = row_of_ports(nodes + 1)
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    with tempfile.TemporaryDirectory(prefix="asgi-cluster-") as directory:
        log = Path(directory) / "demo.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "demo", "--port", str(port), "--nodes", str(nodes)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
            )
        demo = Demo(process, port, nodes, log)
        try:
            deadline = time.monotonic() + 40
            while "Ctrl-C stops everything" not in demo.log():
                assert process.poll() is None, demo.log()
                assert time.monotonic() < deadline, demo.log()
                time.sleep(0.05)
            yield demo
        finally:
            end(process, patience=10)


def stopped(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs any more. An orphan may stay a zombie in a container without an init."""
    return all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in processes)


def interrupt(demo: Demo, number: int = signal.SIGINT) -> int:
    """What Ctrl-C does; the exit status."""
    demo.process.send_signal(number)
    return demo.process.wait(15)
