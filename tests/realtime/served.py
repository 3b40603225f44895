"""The app that the server tests run in processes of their own; see ``cluster_of_environment``."""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_cluster import ClusterMiddleware, RoomRule, get_session
from tests.support.process import cluster_of_environment

cluster = cluster_of_environment(RoomRule("open", subscribe=True, publish=True))


async def login(request: Request) -> JSONResponse:
    await get_session(request).login(request.query_params["user"])
    return JSONResponse(get_session(request).handle)


async def me(request: Request) -> JSONResponse:
    return JSONResponse({"user": get_session(request).user_id, "pid": os.getpid()})


async def visit(request: Request) -> JSONResponse:
    request.session["visits"] = request.session.get("visits", 0) + 1
    return JSONResponse(request.session["visits"])


async def logout(request: Request) -> JSONResponse:
    receipt = await get_session(request).logout()
    return JSONResponse({"closed": receipt.sockets_closed, "complete": receipt.complete})


async def stats(request: Request) -> JSONResponse:
    realtime = cluster.stats().realtime
    return JSONResponse({"direct": realtime.direct, "fallback": dict(realtime.fallback)})


async def room(websocket: WebSocket) -> None:
    async with cluster.accept(websocket) as connection:
        await connection.join("open")
        await connection.send("ready")
        async for message in connection:
            await cluster.room("open").broadcast(message)


async def away(websocket: WebSocket) -> None:
    """Closes with a code that not every server lets an app send."""
    async with cluster.accept(websocket) as connection:
        await connection.close(1001, "going away")
        async for _ in connection:
            pass


async def plain(websocket: WebSocket) -> None:
    """Knows nothing of the cluster."""
    await websocket.accept()
    try:
        while True:
            await websocket.send_text("echo " + await websocket.receive_text())
    except WebSocketDisconnect:
        return


app = ClusterMiddleware(
    Starlette(
        routes=[
            Route("/login", login),
            Route("/me", me),
            Route("/visit", visit),
            Route("/logout", logout),
            Route("/stats", stats),
            WebSocketRoute("/room", room),
            WebSocketRoute("/plain", plain),
            WebSocketRoute("/away", away),
        ]
    ),
    cluster,
)
