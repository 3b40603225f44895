"""A cluster of real uvicorn nodes in the test's own loop, and a bare client of the protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import websockets
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from asgi_cluster import Cluster, ClusterMiddleware, CookieConfig, RealtimeConfig, SessionConfig, get_session
from tests.support.nodes import Node as Served
from tests.support.nodes import serve


async def login(request: Request) -> JSONResponse:
    await get_session(request).login(request.query_params["user"])
    return JSONResponse(get_session(request).handle)


async def logout(request: Request) -> JSONResponse:
    receipt = await get_session(request).logout()
    return JSONResponse({"closed": receipt.sockets_closed, "complete": receipt.complete})


class Node:
    """One cluster object, served by one uvicorn."""

    def __init__(self, cluster: Cluster, served: Served) -> None:
        self.cluster = cluster
        self.http = served.url
        self.ws = served.ws_url

    @property
    def endpoint(self) -> str:
        return f"{self.ws}/realtime/websocket"

    @asynccontextmanager
    async def client(self, cookie: str = "", **options: Any) -> AsyncIterator[Raw]:
        """A client of the protocol that has connected."""
        async with self.raw(cookie, **options) as client:
            await client.call("connect", {})
            yield client

    @asynccontextmanager
    async def raw(
        self, cookie: str = "", path: str = "/realtime/websocket", **options: Any
    ) -> AsyncIterator[Raw]:
        """A WebSocket to this node."""
        headers = options.pop("headers", {}) | ({"cookie": cookie} if cookie else {})
        options.setdefault("compression", None)
        async with websockets.connect(
            self.ws + path, additional_headers=headers, proxy=None, close_timeout=1, **options
        ) as connection:
            yield Raw(connection)


class Raw:
    """The protocol by hand."""

    def __init__(self, connection: websockets.ClientConnection) -> None:
        self.ws = connection
        self.replies: dict[int, dict[str, Any]] = {}
        self.pushes: list[dict[str, Any]] = []
        self._last_id = 0

    async def send(self, *commands: Any) -> None:
        await self.ws.send("\n".join(json.dumps(command) for command in commands))

    async def call(self, name: str, request: Any) -> dict[str, Any]:
        """Send one command and return its reply, as it came."""
        self._last_id += 1
        await self.send({"id": self._last_id, name: request})
        return await self.reply(self._last_id)

    async def reply(self, command_id: int) -> dict[str, Any]:
        while command_id not in self.replies:
            await self._read()
        return self.replies.pop(command_id)

    async def push(self) -> dict[str, Any]:
        """The next push."""
        while not self.pushes:
            await self._read()
        return self.pushes.pop(0)

    async def pub(self) -> Any:
        """The data of the next push, which has to be a publication."""
        return (await self.push())["pub"]["data"]

    async def _read(self) -> None:
        frame = await asyncio.wait_for(self.ws.recv(), 5)
        for line in str(frame).split("\n"):
            message = json.loads(line)
            if not message:
                await self.ws.send("{}")
            elif "push" in message:
                self.pushes.append(message["push"])
            else:
                self.replies[message["id"]] = message

    async def drained(self, timeout: float = 5) -> tuple[int, str]:
        """Read until the close frame."""
        async with asyncio.timeout(timeout):
            with suppress(websockets.ConnectionClosed):
                while True:
                    await self.ws.recv()
        return self.ws.close_code or 1006, self.ws.close_reason or ""

    async def closed(self) -> tuple[int, str]:
        """Wait for the close frame."""
        await asyncio.wait_for(self.ws.wait_closed(), 5)
        return self.ws.close_code or 1006, self.ws.close_reason or ""


class Site:
    """Nodes that share one cluster."""

    def __init__(self, url: str, prefix: str, stack: AsyncExitStack) -> None:
        self.url = url
        self.prefix = prefix
        self._stack = stack

    async def node(
        self,
        *,
        routes: list[BaseRoute] | None = None,
        wrap: Callable[[Any], Any] | None = None,
        server: dict[str, Any] | None = None,
        cluster: dict[str, Any] | None = None,
        app: Any = None,
        **realtime: Any,
    ) -> Node:
        """Start one more; ``realtime`` are ``RealtimeConfig``'s."""
        made = Cluster(
            self.url,
            prefix=self.prefix,
            realtime=RealtimeConfig(**realtime),
            sessions=SessionConfig(cookie=CookieConfig(secure=False)),
            **(cluster or {}),
        )
        all_routes = [Route("/login", login), Route("/logout", logout), *(routes or ())]
        inner = app or Starlette(routes=all_routes)
        if isinstance(inner, Starlette):
            inner.state.cluster = made
        wrapped = ClusterMiddleware(inner, made)
        served = await self._stack.enter_async_context(
            serve(wrap(wrapped) if wrap else wrapped, **(server or {}))
        )
        return Node(made, served)
