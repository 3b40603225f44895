"""Real uvicorn servers: in this event loop, or as processes of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from loadtest.ports import free_port
from tests.support.machine import LOCAL, ROOT, end, spawn
from tests.support.waiting import eventually


class _Server(uvicorn.Server):
    """uvicorn without its hands on the signals of the test process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(eq=False)
class Node:
    """A served app."""

    port: int
    app: Any = None
    scheme: str = ""
    """``"s"`` for TLS."""
    server: uvicorn.Server | None = None
    process: subprocess.Popen[bytes] | None = None
    log_path: Path | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http{self.scheme}://{LOCAL}:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws{self.scheme}://{LOCAL}:{self.port}"

    # Of a process of its own

    @property
    def pid(self) -> int:
        assert self.process is not None, "this node runs in the test's own process"
        return self.process.pid

    def signal(self, number: int) -> None:
        """Any signal: SIGTERM, SIGKILL, SIGSTOP, SIGCONT."""
        assert self.process is not None, "this node runs in the test's own process"
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9: no close frame, no goodbye to Redis."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def log(self) -> str:
        """All it has written so far."""
        return self.log_path.read_text(errors="replace") if self.log_path else ""


@asynccontextmanager
async def serve(app: Any, *, port: int = 0, **options: Any) -> AsyncIterator[Node]:
    """Serve ``app`` with real uvicorn in the running loop, lifespan included; stopped at the end.

    ``options`` are those of ``uvicorn.Config``; ``ssl_certfile`` and ``ssl_keyfile`` make it https.

    Raises:
        RuntimeError: the app refused to start.
    """
    settings: dict[str, Any] = {
        "ws": "websockets-sansio",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "timeout_graceful_shutdown": 3,
        **options,
    }
    listener = socket.create_server((LOCAL, port), backlog=2048)
    server = _Server(uvicorn.Config(app, **settings))
    node = Node(
        listener.getsockname()[1], app=app, scheme="s" if settings.get("ssl_certfile") else "", server=server
    )
    with listener:
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(_run(server, listener), name=f"uvicorn {node.port}")
            await eventually(lambda: server.started or serving.done(), timeout=15, message="no startup")
            if not server.started:
                raise RuntimeError("the app refused to start: see the log")
            try:
                yield node
            finally:
                server.should_exit = True


async def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    try:
        await server.serve(sockets=[listener])
    except SystemExit as error:  # uvicorn's way to say that startup failed
        raise RuntimeError("the app refused to start: see the log") from error


@asynccontextmanager
async def several(count: int, make_app: Callable[[int], Any], **options: Any) -> AsyncIterator[list[Node]]:
    """``count`` nodes in this loop; ``make_app(0)``, ``make_app(1)``, ... give their apps."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(serve(make_app(index), **options)) for index in range(count)]


@asynccontextmanager
async def serve_process(
    target: str,
    count: int = 1,
    *,
    env: Mapping[str, str] | None = None,
    args: tuple[str, ...] = (),
    loop: str = "auto",
) -> AsyncIterator[list[Node]]:
    """``count`` uvicorn processes of ``"module:app"``, each on a port of its own; stopped at the end by pid.

    ``env`` is added to this process's environment, ``args`` to uvicorn's command line.
    """
    with tempfile.TemporaryDirectory(prefix="asgi-cluster-") as directory:
        nodes: list[Node] = []
        try:
            for index in range(count):
                log = Path(directory) / f"{index}.log"
                nodes += [_start_process(target, log, env or {}, args, loop)]
            for node in nodes:
                await eventually(partial(listens, node), timeout=20, message=f"no {target}")
            yield nodes
        finally:
            for node in nodes:
                assert node.process is not None
                if node.process.poll() is None:  # all at once: each needs its time to say goodbye
                    node.process.send_signal(signal.SIGCONT)
                    node.process.terminate()
            for node in nodes:
                assert node.process is not None
                await asyncio.to_thread(end, node.process)


def _start_process(target: str, log: Path, env: Mapping[str, str], args: tuple[str, ...], loop: str) -> Node:
    port = free_port()
    command = [
        *(sys.executable, "-m", "uvicorn", target, "--host", LOCAL, "--port", str(port)),
        *("--ws", "websockets-sansio", "--lifespan", "on", "--loop", loop, "--no-access-log"),
        *("--timeout-graceful-shutdown", "3", *args),
    ]
    with log.open("wb") as file:
        process = spawn(command, log=file, env={**os.environ, **env}, cwd=ROOT)
    return Node(port, process=process, log_path=log)


def listens(node: Node) -> bool:
    assert node.process is not None
    if node.process.poll() is not None:
        raise RuntimeError(f"node ended with {node.process.returncode}:\n{node.log()[-4000:]}")
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOCAL, node.port)) == 0
