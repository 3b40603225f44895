"""``on_bus_error="local"``: a broadcast whose outcome is unknown reaches each member here once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import websockets

from asgi_cluster import BusUnavailable, Cluster, ClusterMiddleware, RealtimeConfig, RoomRule
from tests.support.nodes import serve


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Has nothing of its own."""


@pytest.mark.parametrize("arrives", ["before the error", "after the error", "never"])
async def test_broadcast_in_doubt_is_delivered_once(
    prefix: str, arrives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the bus brought it before the reply was given up, brings it later, or lost it."""
    rules = [RoomRule("news", subscribe=True)]
    cluster = Cluster(f"memory://{prefix}", realtime=RealtimeConfig(rules=rules, on_bus_error="local"))
    bus = cluster._parts.backend.room_bus
    publish = bus.publish
    late: list[tuple[str, bytes]] = []

    async def loses_the_reply(room: str, payload: bytes, *, timeout: float) -> None:
        if arrives == "before the error":
            await publish(room, payload, timeout=timeout)
        elif arrives == "after the error":
            late.append((room, payload))
        raise BusUnavailable("no reply", outcome_unknown=True)

    async with (
        serve(ClusterMiddleware(app, cluster)) as node,
        websockets.connect(f"{node.ws_url}/realtime/websocket") as client,
    ):
        await client.send('{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"news"}}')
        seen: list[Any] = []

        async def until(wanted: Any) -> None:
            while wanted not in seen:
                for line in str(await client.recv()).split("\n"):
                    reply = json.loads(line)
                    seen.append(reply.get("id") or reply.get("push", {}).get("pub", {}).get("data"))

        await until(2)
        with monkeypatch.context() as patch:
            patch.setattr(bus, "publish", loses_the_reply)
            await cluster.room("news").broadcast("in doubt")
        for room, payload in late:
            await publish(room, payload, timeout=1)
        await cluster.room("news").broadcast("the end")
        async with asyncio.timeout(5):
            await until("the end")
    assert seen == [1, 2, "in doubt", "the end"]
