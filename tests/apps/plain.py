"""A plain ASGI callable."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs

from asgi_cluster import Cluster, get_session
from tests.apps.kit import CHUNKS, Seen


def make_app(cluster: Cluster, seen: Seen) -> Any:
    async def http(scope: Any, send: Any) -> None:
        session, path = get_session(scope), scope["path"]
        chunks, after = [json.dumps("ok").encode()], None
        if path == "/login":
            await session.login(parse_qs(scope["query_string"].decode())["user"][0])
        elif path == "/logout":
            receipt = await session.logout()
            chunks = [json.dumps({"closed": receipt.sockets_closed}).encode()]
        elif path == "/clear":
            session.clear()
        elif path == "/me":
            chunks = [json.dumps({"user": session.user_id, "visits": session.get("visits", 0)}).encode()]
        elif path in ("/visit", "/stream"):
            scope["session"]["visits"] = scope["session"].get("visits", 0) + 1
            chunks = [json.dumps({"visits": scope["session"]["visits"]}).encode()]
            if path == "/stream":
                chunks = [chunk.encode() for chunk in CHUNKS]
        elif path == "/background":
            after = session.user_id
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        if path == "/background":
            await cluster.room("lobby").broadcast("after the response")
            seen.background.append(after)

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/room":
            async with cluster.accept((scope, receive, send)) as connection:
                await connection.join("lobby")
                async for message in connection:
                    await cluster.room("lobby").broadcast(message)
            return
        await receive()
        await send({"type": "websocket.accept"})
        while (event := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": event["text"]})
        seen.closes.append(event["code"])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await http(scope, send)
        elif scope["type"] == "websocket":
            await websocket(scope, receive, send)
        else:
            raise NotImplementedError(scope["type"])  # no lifespan, as many plain apps

    return app
