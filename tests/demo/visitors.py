"""People at a running demo, without a browser."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from tests.demo.running import Demo


@asynccontextmanager
async def visitor(demo: Demo, name: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=demo.node_url(1)) as client:
        if name is not None:
            answer = await client.post("/api/login", json={"name": name})
            assert answer.status_code == 200, answer.text
        yield client


@asynccontextmanager
async def realtime(demo: Demo, number: int, client: httpx.AsyncClient) -> AsyncIterator[ClientConnection]:
    cookies = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    url = demo.node_url(number).replace("http", "ws") + "/realtime/websocket"
    async with connect(url, additional_headers={"cookie": cookies}, proxy=None) as socket:
        await ask(socket, 1, {"connect": {}})
        yield socket


async def ask(socket: ClientConnection, number: int, command: dict[str, Any]) -> dict[str, Any]:
    await socket.send(json.dumps({"id": number, **command}))
    while True:
        for line in str(await socket.recv()).splitlines():
            reply: dict[str, Any] = json.loads(line)
            if reply.get("id") == number:
                return reply
