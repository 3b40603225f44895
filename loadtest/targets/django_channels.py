"""Django Channels with the Pub/Sub layer of channels_redis."""

from __future__ import annotations

import json
from typing import Any

import django
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import get_channel_layer
from channels.routing import ProtocolTypeRouter, URLRouter
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.urls import path

from loadtest.target import Subject


def make(url: str, prefix: str) -> Subject:
    settings.configure(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="for the load test",
        CHANNEL_LAYERS={
            "default": {
                "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
                "CONFIG": {"hosts": [url], "prefix": prefix},
            }
        },
    )
    django.setup()
    layer = get_channel_layer()

    class Room(AsyncWebsocketConsumer):  # type: ignore[misc]
        async def connect(self) -> None:
            await self.channel_layer.group_add("load", self.channel_name)
            await self.accept()
            await self.send(text_data="ready")

        async def disconnect(self, code: int) -> None:
            await self.channel_layer.group_discard("load", self.channel_name)

        async def room_message(self, event: dict[str, Any]) -> None:
            await self.send(text_data=event["text"])

    async def publish(value: dict[str, Any]) -> None:
        await layer.group_send("load", {"type": "room.message", "text": json.dumps(value)})

    sockets = URLRouter([path("ws", Room.as_asgi())])
    return Subject(ProtocolTypeRouter({"http": get_asgi_application(), "websocket": sockets}), publish)


urlpatterns: list[Any] = []
