"""FastAPI, with the session as a dependency."""

from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse

from asgi_cluster import Cluster, Session, get_session
from tests.apps.kit import Seen
from tests.apps.starlette_app import chunks

Current = Annotated[Session, Depends(get_session)]


def make_app(cluster: Cluster, seen: Seen) -> FastAPI:
    app = FastAPI()

    @app.post("/login")
    async def login(user: str, session: Current) -> str:
        await session.login(user)
        return "ok"

    @app.post("/logout")
    async def logout(session: Current) -> dict[str, int]:
        return {"closed": (await session.logout()).sockets_closed}

    @app.post("/clear")
    async def clear(session: Current) -> str:
        session.clear()
        return "ok"

    @app.get("/me")
    async def me(session: Current) -> dict[str, Any]:
        return {"user": session.user_id, "visits": session.get("visits", 0)}

    @app.post("/visit")
    def visit(request: Request) -> dict[str, int]:  # in a worker thread, as FastAPI does with plain functions
        request.session["visits"] = request.session.get("visits", 0) + 1
        return {"visits": request.session["visits"]}

    @app.get("/quiet")
    async def quiet() -> str:
        return "ok"

    @app.get("/stream")
    async def stream(session: Current) -> StreamingResponse:
        session["visits"] = session.get("visits", 0) + 1
        return StreamingResponse(chunks())

    @app.get("/background")
    async def background(tasks: BackgroundTasks, session: Current) -> str:
        async def work() -> None:
            await cluster.room("lobby").broadcast("after the response")
            seen.background.append(session.user_id)

        tasks.add_task(work)
        return "ok"

    @app.websocket("/plain")
    async def plain(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                await websocket.send_text(await websocket.receive_text())
        except WebSocketDisconnect as disconnect:
            seen.closes.append(disconnect.code)

    @app.websocket("/room")
    async def room(websocket: WebSocket) -> None:
        async with cluster.accept(websocket) as connection:
            await connection.join("lobby")
            async for message in connection:
                await cluster.room("lobby").broadcast(message)

    return app
