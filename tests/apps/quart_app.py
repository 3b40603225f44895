"""Quart. Its own session is a signed cookie of its own; ours is reached through the ASGI scope."""

from __future__ import annotations

from typing import Any

from quart import Quart, Response, request, websocket

from asgi_cluster import Cluster, get_session
from tests.apps.kit import Seen
from tests.apps.starlette_app import chunks


def make_app(cluster: Cluster, seen: Seen) -> Any:
    app = Quart(__name__)

    @app.post("/login")
    async def login() -> Any:
        await get_session(request.scope).login(request.args["user"])
        return ["ok"]

    @app.post("/logout")
    async def logout() -> Any:
        return {"closed": (await get_session(request.scope).logout()).sockets_closed}

    @app.post("/clear")
    async def clear() -> Any:
        get_session(request.scope).clear()
        return ["ok"]

    @app.get("/me")
    async def me() -> Any:
        session = get_session(request.scope)
        return {"user": session.user_id, "visits": session.get("visits", 0)}

    @app.post("/visit")
    async def visit() -> Any:
        session = get_session(request.scope)
        session["visits"] = session.get("visits", 0) + 1
        return {"visits": session["visits"]}

    @app.get("/quiet")
    async def quiet() -> Any:
        return ["ok"]

    @app.get("/stream")
    async def stream() -> Any:
        session = get_session(request.scope)
        session["visits"] = session.get("visits", 0) + 1
        return Response(chunks())

    @app.get("/background")
    async def background() -> Any:
        session = get_session(request.scope)

        async def work() -> None:
            await cluster.room("lobby").broadcast("after the response")
            seen.background.append(session.user_id)

        app.add_background_task(work)
        return ["ok"]

    @app.websocket("/plain")
    async def plain() -> None:
        # Quart cancels the handler on a disconnect and does not tell it the code.
        while True:
            await websocket.send(await websocket.receive())

    quart = app.asgi_app

    async def with_room(scope: Any, receive: Any, send: Any) -> None:
        # Quart takes the receive channel for itself, so a socket of the cluster's is served beside it.
        if scope["type"] == "websocket" and scope["path"] == "/room":
            async with cluster.accept((scope, receive, send)) as connection:
                await connection.join("lobby")
                async for message in connection:
                    await cluster.room("lobby").broadcast(message)
        else:
            await quart(scope, receive, send)

    app.asgi_app = with_room  # type: ignore[method-assign]
    return app
