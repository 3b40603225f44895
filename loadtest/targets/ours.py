"""asgi-cluster: sockets of the built-in endpoint, and app-owned sockets with ``cluster.accept``."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_cluster import (
    Cluster,
    ClusterMiddleware,
    CookieConfig,
    RealtimeConfig,
    RoomRule,
    SessionConfig,
    get_session,
)
from loadtest.target import Subject


def make(url: str, prefix: str) -> Subject:
    cluster = Cluster(
        url,
        prefix=prefix,
        sessions=SessionConfig(cookie=CookieConfig(secure=False)),
        realtime=RealtimeConfig(
            rules=[
                RoomRule("load", subscribe=True),
                RoomRule("many:{number}", subscribe=True),
                RoomRule("kept:{number}", subscribe=True, history=2000, history_ttl=600),
            ],
        ),
    )
    room = cluster.room("load")

    async def login(request: Request) -> Response:
        await get_session(request).login(request.query_params["user"])
        return JSONResponse("ok")

    async def logout(request: Request) -> Response:
        receipt = await get_session(request).logout()
        return JSONResponse({"complete": receipt.complete, "elapsed": receipt.elapsed})

    async def keep(request: Request) -> Response:
        """Publish one numbered message in a room with history."""
        number = request.query_params["room"]
        await cluster.room(f"kept:{number}").broadcast({"n": int(request.query_params["n"])})
        return JSONResponse("ok")

    async def socket(websocket: WebSocket) -> None:
        async with cluster.accept(websocket) as connection:
            await connection.join("load")
            await connection.send("ready")
            async for _ in connection:
                pass

    app = Starlette(
        routes=[
            Route("/login", login, methods=["POST"]),
            Route("/logout", logout, methods=["POST"]),
            Route("/keep", keep, methods=["POST"]),
            WebSocketRoute("/ws", socket),
        ]
    )

    async def to(number: int, value: dict[str, Any]) -> None:
        await cluster.room(f"many:{number}").broadcast(value)

    return Subject(ClusterMiddleware(app, cluster), room.broadcast, to)
