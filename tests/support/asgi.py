"""The ASGI servers, each as the process that its users start."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from loadtest.ports import free_port
from tests.support.machine import LOCAL, ROOT, end, spawn
from tests.support.nodes import Node, listens
from tests.support.waiting import eventually

Command = Callable[[str, int], list[str]]
"""``(target, port)``: what comes after ``python -m``."""


def uvicorn(*args: str) -> Command:
    return lambda target, port: [
        *("uvicorn", target, "--host", LOCAL, "--port", str(port), "--no-access-log"),
        *("--timeout-graceful-shutdown", "3", *args),
    ]


def gunicorn(worker: str, *args: str) -> Command:
    return lambda target, port: [
        *("gunicorn", target, "-k", worker, "-b", f"{LOCAL}:{port}", "--graceful-timeout", "8", *args),
        *("--no-control-socket", "--timeout", "60"),
    ]


def hypercorn(*args: str) -> Command:
    return lambda target, port: [
        *("hypercorn", target, "-b", f"{LOCAL}:{port}", "--graceful-timeout", "2", *args)
    ]


def granian(*args: str) -> Command:
    return lambda target, port: ["granian", "--host", LOCAL, "--port", str(port), *args, target]


def daphne(target: str, port: int) -> list[str]:
    return ["daphne", "-b", LOCAL, "-p", str(port), target]


SERVERS: Mapping[str, Command] = {
    "uvicorn, websockets-sansio": uvicorn("--ws", "websockets-sansio"),
    "uvicorn, websockets": uvicorn("--ws", "websockets"),
    "uvicorn, wsproto": uvicorn("--ws", "wsproto"),
    "uvicorn, lifespan off": uvicorn("--ws", "websockets-sansio", "--lifespan", "off"),
    "uvicorn, 2 workers": uvicorn("--ws", "websockets-sansio", "--workers", "2"),
    "gunicorn, uvicorn worker, 2 workers": gunicorn("uvicorn_worker.UvicornWorker", "-w", "2"),
    "gunicorn, uvicorn worker": gunicorn("uvicorn_worker.UvicornWorker"),
    "gunicorn, 2 workers, preloaded": gunicorn("uvicorn_worker.UvicornWorker", "-w", "2", "--preload"),
    "gunicorn, own ASGI worker": gunicorn("asgi"),
    "gunicorn, own ASGI worker, lifespan off": gunicorn("asgi", "--asgi-lifespan", "off"),
    "hypercorn": hypercorn(),
    "hypercorn, 0 workers": hypercorn("--workers", "0"),
    "granian": granian("--interface", "asgi"),
    "granian, without lifespan": granian("--interface", "asginl"),
    "Daphne": daphne,
}


@asynccontextmanager
async def running(
    server: str, target: str, *, env: Mapping[str, str] | None = None, args: tuple[str, ...] = ()
) -> AsyncIterator[Node]:
    """``target`` served by ``server``, one of ``SERVERS``; stopped at the end by its pid."""
    port = free_port()
    command = [sys.executable, "-m", *SERVERS[server](target, port), *args]
    with tempfile.TemporaryDirectory(prefix="asgi-cluster-") as directory:
        log = Path(directory) / "log"
        with log.open("wb") as file:
            process = spawn(command, log=file, env={**os.environ, **(env or {})}, cwd=ROOT)
        node = Node(port, process=process, log_path=log, scheme="s" if "--ssl-keyfile" in args else "")
        try:
            await eventually(lambda: listens(node), timeout=120, message=f"no {server}")
            yield node
        finally:
            await asyncio.to_thread(end, process, patience=15)
