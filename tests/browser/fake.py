"""A WebSocket server that says exactly what a test tells it to: what a real one does not show on demand.

The same port serves an empty page and ``client.js``, so that the page's own origin is that of the socket.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from tests.support.machine import LOCAL, ROOT

_FILES = {
    "/": (b"<!doctype html><title>fake</title>", "text/html"),
    "/realtime/client.js": ((ROOT / "asgi_cluster/centrifuge/js/client.js").read_bytes(), "text/javascript"),
    "/state.js": ((ROOT / "demo/static/state.js").read_bytes(), "text/javascript"),
}

Command = dict[str, Any]


@dataclass(eq=False)
class Peer:
    """One connection of the client under test."""

    socket: ServerConnection
    number: int
    """Counted from 1."""
    commands: asyncio.Queue[Command] = field(default_factory=asyncio.Queue)

    async def next(self, name: str) -> Command:
        """The next command, which has to be this one."""
        command = await self.commands.get()
        assert name in command, command
        return command

    async def say(self, *replies: dict[str, Any]) -> None:
        """Replies and pushes in one frame."""
        await self.socket.send("\n".join(json.dumps(reply) for reply in replies))

    async def welcome(self, **result: Any) -> Command:
        """Answer the connect command; returns it."""
        command = await self.next("connect")
        await self.say(
            {"id": command["id"], "connect": {"client": f"c{self.number}", "version": "fake", **result}}
        )
        return command

    async def close(self, code: int, reason: str = "") -> None:
        await self.socket.close(code, reason)


@dataclass(eq=False)
class Fake:
    """The server, and every connection it had."""

    url: str = ""
    peers: asyncio.Queue[Peer] = field(default_factory=asyncio.Queue)
    count: int = 0

    async def peer(self, timeout: float = 10) -> Peer:
        """The next connection."""
        async with asyncio.timeout(timeout):
            return await self.peers.get()


@asynccontextmanager
async def fake_server() -> AsyncIterator[Fake]:
    """Serve on a free port."""
    fake = Fake()

    async def handle(socket: ServerConnection) -> None:
        fake.count += 1
        peer = Peer(socket, fake.count)
        fake.peers.put_nowait(peer)
        with suppress(ConnectionClosed):  # the client may go, and the test may close, whenever they like
            async for frame in socket:
                for line in str(frame).split("\n"):
                    peer.commands.put_nowait(json.loads(line))

    def page(socket: ServerConnection, request: Request) -> Response | None:
        if request.path == "/realtime/websocket":
            return None
        body, kind = _FILES.get(request.path, (b"", "text/plain"))
        status = HTTPStatus.OK if request.path in _FILES else HTTPStatus.NOT_FOUND
        headers = Headers({"content-type": kind, "content-length": str(len(body)), "connection": "close"})
        return Response(status, status.phrase, headers, body)

    handler: Callable[[ServerConnection], Awaitable[None]] = handle
    async with serve(handler, LOCAL, 0, process_request=page) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        fake.url = f"http://{LOCAL}:{port}"
        yield fake
