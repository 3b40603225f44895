"""Rooms on a Redis of their own, and other ways to reach a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.credentials import UsernamePasswordCredentialProvider

from asgi_cluster.bus.messages import Changed, encode
from asgi_cluster.exceptions import BusUnavailable, StoreUnavailable
from tests.bus.nodes import Node, opened, our_tasks
from tests.support.proxy import Proxy
from tests.support.servers import Server, start_valkey
from tests.support.waiting import eventually


async def works(node: Node) -> None:
    await node.room_bus.subscribe("r")
    await node.room_bus.publish("r", b"\nm", timeout=1)
    await node.session_bus.publish(3, encode(Changed("03.x", "me")), timeout=1)
    await eventually(lambda: node.receiver.heard("r") == [b"m"] and node.receiver.of("session"))
    assert set(await node.session_bus.nodes(timeout=1)) == {node.id}


async def test_rooms_go_to_their_own_server(valkey: Server, prefix: str) -> None:
    """Room channels are on one server, session channels on the other; both have a registry."""
    with start_valkey() as rooms:
        async with opened(valkey.url, prefix, rooms_url=rooms.url) as node:
            await works(node)
            assert rooms.client().pubsub_channels("*:room:*") == [f"{prefix}:0:room:r".encode()]
            assert valkey.client().pubsub_channels(f"{prefix}:0:room:*") == []
            assert rooms.client().pubsub_channels("*:sessions") == []
            assert set(await node.backend.presence._registry.nodes(timeout=1)) == {node.id}
        assert rooms.client().keys("*") == []


async def test_sessions_go_on_when_the_rooms_server_dies(valkey: Server, prefix: str) -> None:
    """No gap, no lapse and no unreadiness for sessions; rooms get a gap, and come back."""
    with start_valkey() as rooms:
        async with opened(valkey.url, prefix, rooms_url=rooms.url) as node:
            await works(node)
            rooms.kill()
            await eventually(lambda: node.receiver.of("rooms gap"))
            assert not node.room_bus.lease("r").live
            with pytest.raises(BusUnavailable):
                await node.room_bus.publish("r", b"\nlost", timeout=0.2)
            assert node.live
            assert node.backend.ready
            await node.session_bus.publish(3, encode(Changed("03.y", "me")), timeout=1)
            await eventually(lambda: ("session", "03.y") in node.receiver.events)
            rooms.restart()
            await eventually(lambda: node.receiver.of("rooms restored"))
            await node.room_bus.publish("r", b"\nback", timeout=1)
            await eventually(lambda: b"back" in node.receiver.heard("r"))
            assert node.receiver.of("gap") == []


async def test_a_saturated_rooms_server_costs_no_session(valkey: Server, prefix: str) -> None:
    """A flood that gets the rooms' subscriber cut off leaves the sessions' lease alone."""
    with start_valkey("--client-output-buffer-limit", "pubsub 64kb 32kb 1") as rooms:
        async with Proxy(rooms.url) as proxy, opened(valkey.url, prefix, rooms_url=proxy.url) as node:
            await works(node)
            proxy.stall("down", only=b"SUBSCRIBE")
            with rooms.client() as client:
                for _ in range(400):
                    client.publish(f"{prefix}:0:room:r", b"\n" + bytes(50_000))
            proxy.heal()
            await eventually(lambda: node.receiver.of("rooms gap"))
            await eventually(lambda: node.receiver.of("rooms restored"))
            assert node.receiver.of("gap") == []
            assert node.live


async def test_a_unix_socket(tmp_path: Path, prefix: str) -> None:
    """As good as TCP; its path is in the error when it is not there."""
    path = tmp_path / "s"
    with pytest.raises(StoreUnavailable, match=str(path)):
        async with opened(f"unix://{path}", prefix):
            pytest.fail("it opened")
    with start_valkey("--unixsocket", str(path)):
        async with opened(f"unix://{path}?db=3", prefix) as node:
            await works(node)
    assert our_tasks() == []


async def test_a_user_from_a_credential_provider(prefix: str) -> None:
    """Asked at every connection, so that it may rotate."""
    with start_valkey(
        "--user", *["worker", "on", ">pw", "~*", "&*", "+@all"], "--user", *["default", "off"]
    ) as server:
        provider = UsernamePasswordCredentialProvider("worker", "pw")
        url = f"redis://127.0.0.1:{server.port}"
        async with opened(url, prefix, credential_provider=provider) as node:
            await works(node)
        with pytest.raises(StoreUnavailable, match="password"):
            async with opened(url, prefix):
                pytest.fail("it opened")


async def test_databases_do_not_hear_each_other(valkey: Server, prefix: str) -> None:
    """Pub/Sub ignores the database; the channel names do not."""
    async with opened(f"{valkey.url[:-1]}1", prefix) as one, opened(f"{valkey.url[:-1]}2", prefix) as two:
        await works(one)
        await two.room_bus.subscribe("r")
        await two.room_bus.publish("r", b"\ntwo", timeout=1)
        await eventually(lambda: two.receiver.heard("r") == [b"two"])
        assert one.receiver.heard("r") == [b"m"]
