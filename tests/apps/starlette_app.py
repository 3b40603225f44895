"""Starlette, with ``request.session`` as its documentation shows it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_cluster import Cluster, get_session
from tests.apps.kit import CHUNKS, Seen


async def chunks() -> AsyncIterator[str]:
    for chunk in CHUNKS:
        yield chunk


def make_routes(cluster: Cluster, seen: Seen) -> list[BaseRoute]:
    async def login(request: Request) -> Response:
        await get_session(request).login(request.query_params["user"])
        return JSONResponse("ok")

    async def logout(request: Request) -> Response:
        receipt = await get_session(request).logout()
        return JSONResponse({"closed": receipt.sockets_closed})

    async def clear(request: Request) -> Response:
        request.session.clear()
        return JSONResponse("ok")

    async def me(request: Request) -> Response:
        return JSONResponse(
            {"user": get_session(request).user_id, "visits": request.session.get("visits", 0)}
        )

    async def visit(request: Request) -> Response:
        request.session["visits"] = request.session.get("visits", 0) + 1
        return JSONResponse({"visits": request.session["visits"]})

    async def quiet(request: Request) -> Response:
        return JSONResponse("ok")

    async def stream(request: Request) -> Response:
        request.session["visits"] = request.session.get("visits", 0) + 1
        return StreamingResponse(chunks())

    async def background(request: Request) -> Response:
        async def work() -> None:
            await cluster.room("lobby").broadcast("after the response")
            seen.background.append(get_session(request).user_id)

        return JSONResponse("ok", background=BackgroundTask(work))

    async def plain(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                await websocket.send_text(await websocket.receive_text())
        except WebSocketDisconnect as disconnect:
            seen.closes.append(disconnect.code)

    async def room(websocket: WebSocket) -> None:
        async with cluster.accept(websocket) as connection:
            await connection.join("lobby")
            async for message in connection:
                await cluster.room("lobby").broadcast(message)

    posts = [login, logout, clear, visit]
    gets = [me, quiet, stream, background]
    return [
        *[Route(f"/{handler.__name__}", handler, methods=["POST"]) for handler in posts],
        *[Route(f"/{handler.__name__}", handler) for handler in gets],
        WebSocketRoute("/plain", plain),
        WebSocketRoute("/room", room),
    ]


def make_app(cluster: Cluster, seen: Seen, **options: Any) -> Starlette:
    return Starlette(routes=make_routes(cluster, seen), **options)
