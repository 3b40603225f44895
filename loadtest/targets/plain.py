"""Starlette and uvicorn without asgi-cluster."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from loadtest.target import Subject


def make(url: str, prefix: str) -> Subject:
    """A WebSocket that only waits: the cost of uvicorn and Starlette alone."""

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("ready")
        try:
            while True:
                await websocket.receive()
        except (WebSocketDisconnect, RuntimeError):
            return

    return Subject(Starlette(routes=[WebSocketRoute("/ws", socket)]))


def make_tutorial(url: str, prefix: str) -> Subject:
    """The loop of many tutorials: ``await send_text`` for each client, with messages from Redis Pub/Sub."""
    sockets: list[WebSocket] = []
    client = redis.asyncio.Redis.from_url(url)

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        sockets.append(websocket)
        await websocket.send_text("ready")
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            sockets.remove(websocket)

    async def listen(messages: Any) -> None:
        async for message in messages.listen():
            if message["type"] == "message":
                text = message["data"].decode()
                for websocket in sockets:
                    await websocket.send_text(text)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        import anyio

        messages = client.pubsub()
        await messages.subscribe(f"{prefix}:load")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, messages)
            yield
            tasks.cancel_scope.cancel()
        await client.aclose()

    async def publish(value: dict[str, Any]) -> None:
        await client.publish(f"{prefix}:load", json.dumps(value))

    return Subject(Starlette(routes=[WebSocketRoute("/ws", socket)], lifespan=lifespan), publish)
