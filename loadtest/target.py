"""A server process under test: ``python -m loadtest.target KIND --port N --redis URL --prefix P``.

Besides the app under test it serves a few control paths, which the load test uses.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import parse_qsl

import uvicorn

from loadtest.allocations import by_package

_PATHS = ("/health", "/publish", "/published", "/collect", "/held")
MARK = "@@"
"""Occurs once in every message, and nowhere else."""
KINDS = {
    "endpoint": "ours:make",
    "app": "ours:make",
    "plain-socket": "plain:make",
    "tutorial": "plain:make_tutorial",
    "litestar": "litestar_channels:make",
    "channels": "django_channels:make",
    "socketio": "socketio_python:make",
}


@dataclass
class Subject:
    """One kind of server: an ASGI app, and how it sends a message to all its clients."""

    app: Any
    publish: Callable[[dict[str, Any]], Awaitable[Any]] | None = None
    """``None``: nothing is ever sent to its sockets."""
    publish_to: Callable[[int, dict[str, Any]], Awaitable[Any]] | None = None
    """Sends to the room with that number; ``None``: there is only one room."""


def message(size: int) -> dict[str, Any]:
    """A message of ``size`` bytes as compact JSON (at least 40), with the mark and the time of sending."""
    now = time.monotonic_ns()
    return {"m": MARK, "t": now, "p": "x" * (size - len(f'{{"m":"{MARK}","t":{now},"p":""}}'))}


class Driver:
    """Serves the control paths inside the server. The ``send`` of WebSockets is not wrapped."""

    def __init__(self, subject: Subject) -> None:
        self._app = subject.app
        self._subject = subject
        self._published = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path")
        if scope["type"] != "http" or path not in _PATHS:
            await self._app(scope, receive, send)
            return
        if path == "/publish":
            options = {key: float(value) for key, value in parse_qsl(scope["query_string"].decode())}
            self._start(options)
        if path == "/collect":
            gc.collect()
        busy = any(not task.done() for task in self._tasks)
        answer: dict[str, Any] = {"published": self._published, "busy": busy}
        if path == "/held":
            answer["held"] = by_package()
        body = json.dumps(answer).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    def _publish(self, number: int, rooms: int, size: int) -> Awaitable[Any]:
        if rooms and self._subject.publish_to is not None:
            return self._subject.publish_to(number % rooms, message(size))
        if self._subject.publish is None:
            raise ValueError("this kind of server cannot publish: its sockets only wait")
        return self._subject.publish(message(size))

    def _start(self, options: dict[str, float]) -> None:
        task = asyncio.get_running_loop().create_task(self._run(options))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, options: dict[str, float]) -> None:
        """Publish ``count`` messages of ``size`` bytes, ``batch`` at a time, ``gap`` ms between batches."""
        count, size = int(options["count"]), int(options.get("size", 128))
        rooms = int(options.get("rooms", 0))
        batch, gap = int(options.get("batch", 10)), options.get("gap", 0.0) / 1000
        loop = asyncio.get_running_loop()
        due = loop.time()
        for start in range(0, count, batch):
            number = min(batch, count - start)
            if number == 1:
                await self._publish(start, rooms, size)
            else:
                await asyncio.gather(*(self._publish(start + one, rooms, size) for one in range(number)))
            self._published += number
            if gap:
                due += gap
                await asyncio.sleep(max(0.0, due - loop.time()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--prefix", required=True)
    options = parser.parse_args()
    module, name = KINDS[options.kind].split(":")
    make = getattr(import_module(f"loadtest.targets.{module}"), name)
    config = uvicorn.Config(
        Driver(make(options.redis, options.prefix)),
        port=options.port,
        loop="uvloop",
        http="httptools",
        ws="websockets-sansio",
        ws_ping_interval=None,  # the generator does not answer WebSocket pings
        log_level="warning",
        access_log=False,
        backlog=4096,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
