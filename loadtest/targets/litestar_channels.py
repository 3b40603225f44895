"""Litestar's channels plugin with its Redis Pub/Sub backend."""

from __future__ import annotations

from typing import Any

import redis.asyncio
from litestar import Litestar, WebSocket, websocket
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.redis import RedisChannelsPubSubBackend
from litestar.exceptions import WebSocketDisconnect

from loadtest.target import Subject


def make(url: str, prefix: str) -> Subject:
    backend = RedisChannelsPubSubBackend(
        redis=redis.asyncio.Redis.from_url(url), key_prefix=prefix, stream_sleep_no_subscriptions=1
    )
    plugin = ChannelsPlugin(backend=backend, channels=["load"])

    @websocket("/ws")
    async def socket(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        async with (
            plugin.start_subscription(["load"]) as subscriber,
            subscriber.run_in_background(socket.send_text),
        ):
            await socket.send_text("ready")
            try:
                while True:
                    await socket.receive_text()
            except WebSocketDisconnect:
                return

    async def publish(value: dict[str, Any]) -> None:
        await plugin.wait_published(value, "load")

    return Subject(Litestar([socket], plugins=[plugin], logging_config=None), publish)
