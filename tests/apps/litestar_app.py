"""Litestar, with ``request.session``, ``set_session`` and ``clear_session`` of its own."""

from typing import Any

from litestar import Litestar, Request, WebSocket, get, post, websocket
from litestar.background_tasks import BackgroundTask
from litestar.exceptions import WebSocketDisconnect
from litestar.response import Response, Stream

from asgi_cluster import Cluster, get_session
from tests.apps.kit import Seen
from tests.apps.starlette_app import chunks


def make_app(cluster: Cluster, seen: Seen) -> Litestar:
    @post("/login", status_code=200)
    async def login(request: Request[Any, Any, Any]) -> str:
        await get_session(request).login(request.query_params["user"])
        return "ok"

    @post("/logout", status_code=200)
    async def logout(request: Request[Any, Any, Any]) -> dict[str, int]:
        return {"closed": (await get_session(request).logout()).sockets_closed}

    @post("/clear", status_code=200)
    async def clear(request: Request[Any, Any, Any]) -> str:
        request.clear_session()  # leaves the class Empty in the scope
        return "ok"

    @get("/me")
    async def me(request: Request[Any, Any, Any]) -> dict[str, Any]:
        return {"user": get_session(request).user_id, "visits": request.session.get("visits", 0)}

    @post("/visit", status_code=200)
    async def visit(request: Request[Any, Any, Any]) -> dict[str, int]:
        visits = request.session.get("visits", 0) + 1
        request.set_session({**request.session, "visits": visits})  # a plain dict in the scope
        return {"visits": visits}

    @get("/quiet")
    async def quiet() -> str:
        return "ok"

    @get("/stream")
    async def stream(request: Request[Any, Any, Any]) -> Stream:
        request.session["visits"] = request.session.get("visits", 0) + 1
        return Stream(chunks())

    @get("/background")
    async def background(request: Request[Any, Any, Any]) -> Response[str]:
        async def work() -> None:
            await cluster.room("lobby").broadcast("after the response")
            seen.background.append(get_session(request).user_id)

        return Response("ok", background=BackgroundTask(work))

    @websocket("/plain")
    async def plain(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        try:
            while True:
                await socket.send_text(await socket.receive_text())
        except WebSocketDisconnect as disconnect:
            seen.closes.append(disconnect.code)

    @websocket("/room")
    async def room(socket: WebSocket[Any, Any, Any]) -> None:
        async with cluster.accept(socket) as connection:
            await connection.join("lobby")
            async for message in connection:
                await cluster.room("lobby").broadcast(message)

    return Litestar(
        [login, logout, clear, me, visit, quiet, stream, background, plain, room], logging_config=None
    )
