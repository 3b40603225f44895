"""python-socketio with its Redis manager."""

from __future__ import annotations

from typing import Any

import socketio

from loadtest.target import Subject


def make(url: str, prefix: str) -> Subject:
    manager = socketio.AsyncRedisManager(url, channel=prefix)
    server = socketio.AsyncServer(async_mode="asgi", client_manager=manager, cors_allowed_origins="*")

    async def connect(sid: str, environ: Any) -> None:
        await server.enter_room(sid, "load")
        await server.emit("ready", to=sid)

    async def publish(value: dict[str, Any]) -> None:
        await server.emit("m", value, room="load")

    server.on("connect", connect)
    return Subject(socketio.ASGIApp(server), publish)
