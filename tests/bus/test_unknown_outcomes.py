"""A change whose reply never came: it is said to be in doubt, it is not repeated, and it happened once or not
at all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal

import httpx
import pytest
import websockets

from asgi_cluster import BusUnavailable, Cluster, ClusterMiddleware, RoomRule, StoreUnavailable
from asgi_cluster.backends.redis.scripts import load
from asgi_cluster.ids import UserId, new_token
from asgi_cluster.rooms.history import Position
from asgi_cluster.sessions.store import NewSession
from tests.bus.nodes import Node, opened
from tests.bus.test_lost_logouts import Visitor, node
from tests.contract.drafts import alive, create, draft, end, end_all, rotate, write
from tests.realtime.site import Raw, Site
from tests.sessions.app import make_app
from tests.support.nodes import serve
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.support.waiting import eventually

Loss = Literal["reply", "command"]
"""What is lost: the reply to something that ran, or something on its way there. The caller cannot see which.
"""

LOSSES = pytest.mark.parametrize("loss", ["reply", "command"])


class Witness:
    """A node behind a proxy, and one that is not and sees what really happened."""

    def __init__(self, node: Node, direct: Node, proxy: Proxy) -> None:
        self.node = node
        self.store = node.backend.store
        self.direct = direct
        self.truth = direct.backend.store
        self.proxy = proxy
        self.heard: list[bytes] = []
        self._command = b""
        direct.receiver.session_message = self._hear  # type: ignore[method-assign]

    def _hear(self, payload: bytes) -> None:
        if payload in (b"changed", b"rotated", b"ended", b"all ended"):
            self.heard.append(payload)

    def lose(self, loss: Loss, command: str) -> None:
        """Of the next command that has this in it; the connection goes with it."""
        self._command = command.encode()
        lose(self.proxy, loss, command)

    async def settled(self) -> None:
        """The node is connected again and goes on; it has not sent that command a second time, and whatever
        was published has arrived.
        """
        await caught_up(self.direct, through=self.node)
        assert self.proxy.swallowed == 1
        assert self.proxy.links
        assert all(self._command not in link.said for link in self.proxy.links)


def lose(proxy: Proxy, loss: Loss, command: str) -> None:
    if loss == "reply":
        proxy.swallow(command.encode())
    else:
        proxy.lose(command.encode())


async def caught_up(direct: Node, *, through: Node) -> None:
    """What was published before has arrived at ``direct``: a message sent later, ``through`` a node, has."""
    before = len(direct.receiver.heard("marker"))
    await through.room_bus.publish("marker", b"\nm", timeout=2)
    await eventually(lambda: len(direct.receiver.heard("marker")) > before)


@asynccontextmanager
async def witness(valkey: Server, prefix: str) -> AsyncIterator[Witness]:
    """The server has all scripts, so that each change is one command."""
    async with Proxy(valkey.url) as proxy, opened(valkey.url, prefix) as direct:
        await direct.room_bus.subscribe("marker")
        await direct.room_bus.subscribe("r")
        await know_scripts(direct)
        await caught_up(direct, through=direct)  # or the messages of these scripts would be counted
        async with opened(proxy.url, prefix, listen=False) as behind:
            yield Witness(behind, direct, proxy)


async def know_scripts(direct: Node) -> None:
    store = direct.backend.store
    made = await create(store, "warm")
    await write(store, made.handle)
    await rotate(store, made.handle, made.secret, b"n" * 32)
    await end(store, made.handle)
    await end_all(store, "warm")
    await publish(direct, "warm", "k")


async def publish(node: Node, room: str, key: str | None) -> Position:
    position: Position = await node.backend.history.publish(
        room, b"x", size=10, ttl=60, idempotency_key=key, epoch=new_token(), timeout=1
    )
    return position


# What a store and a bus say


@LOSSES
async def test_create(valkey: Server, prefix: str, loss: Loss) -> None:
    """The session is there, or it is not."""
    async with witness(valkey, prefix) as seen:
        made = draft("ada")
        seen.lose(loss, load("session_create").sha)
        with pytest.raises(StoreUnavailable) as error:
            await seen.store.create(made, timeout=1)
        assert error.value.outcome_unknown
        await seen.settled()
        found = await seen.truth.devices(UserId("ada"), timeout=1)
        assert [device.handle for device in found] == ([made.handle] if loss == "reply" else [])


@LOSSES
@pytest.mark.parametrize("kind", ["write", "rotate"])
async def test_change(valkey: Server, prefix: str, loss: Loss, kind: str) -> None:
    """One version more and one message, or neither."""
    async with witness(valkey, prefix) as seen:
        made = await create(seen.truth, "ada")

        async def change() -> None:
            if kind == "write":
                await write(seen.store, made.handle)
            else:
                await rotate(seen.store, made.handle, made.secret, b"n" * 32)

        seen.lose(loss, load(f"session_{kind}").sha)
        with pytest.raises(StoreUnavailable) as error:
            await change()
        assert error.value.outcome_unknown
        await seen.settled()
        record = await seen.truth.read(made.handle, timeout=1)
        assert record is not None
        happened = record.fields["cart"] == b"\x02" if kind == "write" else record.secret == b"n" * 32
        assert happened == (loss == "reply")
        assert (record.version, len(seen.heard)) == ((2, 1) if loss == "reply" else (1, 0))


@LOSSES
@pytest.mark.parametrize("kind", ["end", "end_all"])
async def test_logout(valkey: Server, prefix: str, loss: Loss, kind: str) -> None:
    """The session is over and every node received that once, or it lives and none did."""
    async with witness(valkey, prefix) as seen:
        made = await create(seen.truth, "ada")
        with pytest.raises(StoreUnavailable) as error:
            await logout_in_doubt(seen, loss, kind, made)
        assert error.value.outcome_unknown
        await seen.settled()
        assert await alive(seen.truth, made.handle) == (loss == "command")
        assert len(seen.heard) == (loss == "reply")


async def logout_in_doubt(seen: Witness, loss: Loss, kind: str, made: NewSession) -> None:
    seen.lose(loss, load(f"session_{kind}").sha)
    if kind == "end":
        await end(seen.store, made.handle)
    else:
        await end_all(seen.store, "ada")


@LOSSES
async def test_a_login_after_a_logout_in_doubt(valkey: Server, prefix: str, loss: Loss) -> None:
    """A logout everywhere that was repeated unasked would end it."""
    async with witness(valkey, prefix) as seen:
        with pytest.raises(StoreUnavailable):
            await logout_in_doubt(seen, loss, "end_all", await create(seen.truth, "ada"))
        later = await create(seen.truth, "ada")
        await seen.settled()
        assert await alive(seen.truth, later.handle)


@LOSSES
async def test_broadcast_without_history(valkey: Server, prefix: str, loss: Loss) -> None:
    """It arrives once, or not at all."""
    async with witness(valkey, prefix) as seen:
        seen.lose(loss, f"{prefix}:0:room:r")
        with pytest.raises(BusUnavailable) as error:
            await seen.node.room_bus.publish("r", b"\nx", timeout=1)
        assert error.value.outcome_unknown
        await seen.settled()
        assert len(seen.direct.receiver.heard("r")) == (loss == "reply")


@LOSSES
@pytest.mark.parametrize("key", [None, "once"])
async def test_broadcast_with_history(valkey: Server, prefix: str, loss: Loss, key: str | None) -> None:
    """In the history once, or not at all. With a key the caller may repeat it, and it is one message whatever
    happened.
    """
    async with witness(valkey, prefix) as seen:
        first = await publish(seen.direct, "r", None)
        seen.lose(loss, load("room_publish").sha)
        with pytest.raises(BusUnavailable) as error:
            await publish(seen.node, "r", key)
        assert error.value.outcome_unknown
        await seen.settled()
        heard = seen.direct.receiver
        assert len(heard.heard("r")) == (2 if loss == "reply" else 1)

        again = await publish(seen.node, "r", key)
        messages = 3 if loss == "reply" and key is None else 2
        assert again.offset == first.offset + messages - 1
        await caught_up(seen.direct, through=seen.direct)
        assert len(heard.heard("r")) == messages


# What a member of a room sees


@asynccontextmanager
async def member(site_node: Site, rules: list[RoomRule], policy: str) -> AsyncIterator[tuple[Cluster, Raw]]:
    """A node, and a client of it in the room."""
    made = await site_node.node(rules=rules, on_bus_error=policy)
    async with made.client() as client:
        await client.call("subscribe", {"channel": "r"})
        yield made.cluster, client


async def until_the_end(client: Raw) -> list[str]:
    heard = []
    while "the end" not in heard:
        heard.append(await client.pub())
    return heard


@LOSSES
@pytest.mark.parametrize("history", [0, 10])
@pytest.mark.parametrize("policy", ["raise", "local"])
async def test_a_broadcast_in_doubt_reaches_nobody_twice(
    valkey: Server, prefix: str, loss: Loss, policy: str, history: int
) -> None:
    """All members get it once if it ran, whatever the policy; else none, or the node's own with ``local``."""
    rules = [RoomRule("r", subscribe=True, history=history)]
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy(valkey.url))
        behind, own = await stack.enter_async_context(member(Site(proxy.url, prefix, stack), rules, policy))
        direct, other = await stack.enter_async_context(
            member(Site(valkey.url, prefix, stack), rules, policy)
        )
        await direct.room("r").broadcast("before")
        lose(proxy, loss, load("room_publish").sha if history else f"{prefix}:0:room:r")
        if policy == "raise":
            with pytest.raises(BusUnavailable) as error:
                await behind.room("r").broadcast("in doubt")
            assert error.value.outcome_unknown
        else:
            assert await behind.room("r").broadcast("in doubt") is None
        await direct.room("r").broadcast("the end")
        ran = ["before", "in doubt", "the end"]
        not_run = ["before", "the end"]
        assert await until_the_end(other) == (ran if loss == "reply" else not_run)
        # A node's own members may get theirs at once, before what is still under way.
        got = await until_the_end(own)
        assert sorted(got) == sorted(ran if loss == "reply" or policy == "local" else not_run)
        assert proxy.swallowed == 1


# What a user of a browser sees


@asynccontextmanager
async def two_nodes(valkey: Server, prefix: str) -> AsyncIterator[tuple[Proxy, Cluster, str, Cluster, str]]:
    """One behind a proxy, and one that is not, each with its URL."""
    async with AsyncExitStack() as stack:
        await know_scripts(await stack.enter_async_context(opened(valkey.url, prefix, listen=False)))
        proxy = await stack.enter_async_context(Proxy(valkey.url))
        behind, direct = node(proxy.url, prefix), node(valkey.url, prefix)
        here = await stack.enter_async_context(serve(ClusterMiddleware(make_app(), behind)))
        there = await stack.enter_async_context(serve(ClusterMiddleware(make_app(), direct)))
        yield proxy, behind, here.url, direct, there.url


def says_try_again(response: httpx.Response) -> bool:
    return (
        response.status_code == 503
        and int(response.headers["retry-after"]) >= 1
        and "set-cookie" not in response.headers
    )


async def put(visitor: Visitor, url: str, cart: int) -> httpx.Response:
    async with httpx.AsyncClient(base_url=url, headers={"Cookie": visitor.cookie}) as client:
        return await client.post("/put", json={"cart": cart})


async def cart(visitor: Visitor, url: str) -> int:
    found: int = (await visitor.post(url, "/show")).json()["data"]["cart"]
    return found


async def has_cart(visitor: Visitor, url: str, wanted: int) -> bool:
    return await cart(visitor, url) == wanted


@LOSSES
async def test_a_request_whose_write_is_in_doubt(valkey: Server, prefix: str, loss: Loss) -> None:
    """503, all or nothing; what both nodes had cached is right afterwards, and a second try works."""
    visitor = Visitor()
    async with two_nodes(valkey, prefix) as (proxy, _, here, _, there):
        await visitor.login(here)
        assert (await put(visitor, here, 1)).status_code == 200
        assert await cart(visitor, here) == await cart(visitor, there) == 1
        lose(proxy, loss, load("session_write").sha)
        assert says_try_again(await put(visitor, here, 2))
        expected = 2 if loss == "reply" else 1
        assert await cart(visitor, here) == expected

        await eventually(lambda: has_cart(visitor, there, expected))
        assert (await put(visitor, here, 3)).status_code == 200
        assert await cart(visitor, here) == 3
        assert proxy.swallowed == 1


@LOSSES
async def test_a_request_whose_login_is_in_doubt(valkey: Server, prefix: str, loss: Loss) -> None:
    """503 and no cookie: no client can use a session that may be there, so the node ends it."""
    async with two_nodes(valkey, prefix) as (proxy, _, here, direct, _):
        lose(proxy, loss, load("session_create").sha)
        async with httpx.AsyncClient(base_url=here) as client:
            assert says_try_again(await client.post("/login?user=ada"))

            async def forgotten() -> bool:
                return not await direct.user("ada").sessions()

            await eventually(forgotten)
            assert (await client.post("/login?user=ada")).status_code == 200
            assert len(await direct.user("ada").sessions()) == 1
        assert (await direct.user("ada").logout()).sessions == 1


@LOSSES
@pytest.mark.parametrize("way", ["request", "session", "user"])
async def test_a_logout_in_doubt_is_over_or_can_be_repeated(
    valkey: Server, prefix: str, loss: Loss, way: str
) -> None:
    """It raises, or is a 503. If it ran, both nodes have it and every socket is closed; if not, all is as
    before and the next one does it.
    """
    visitor = Visitor()
    async with two_nodes(valkey, prefix) as (proxy, behind, here, _, there):
        handle = await visitor.login(here)
        assert await visitor.user(here) == await visitor.user(there) == "ada"
        async with (
            visitor.socket(here.replace("http", "ws")) as own,
            visitor.socket(there.replace("http", "ws")) as other,
        ):
            lose(proxy, loss, load("session_end_all" if way == "user" else "session_end").sha)
            if way == "request":
                assert says_try_again(await visitor.post(here, "/logout"))
            else:
                with pytest.raises(StoreUnavailable) as error:
                    await (behind.user("ada") if way == "user" else behind.session(handle)).logout()
                assert error.value.outcome_unknown
            if loss == "command":
                assert await visitor.user(here) == await visitor.user(there) == "ada"
                receipt = await behind.session(handle).logout()
                assert (receipt.sessions, receipt.sockets_closed) == (1, 2)
            for socket in (own, other):
                with pytest.raises(websockets.ConnectionClosed):
                    await socket.recv()
                assert socket.close_code == 4501
            assert await visitor.user(here) is None
            assert await visitor.user(there) is None
        assert proxy.swallowed == 1
