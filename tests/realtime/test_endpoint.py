"""The built-in endpoint, by hand: every command, every refusal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import websockets

from asgi_cluster import ConnectRequest, NotPermitted, Position, RoomRequest, RoomRule, TokenExpired
from asgi_cluster.rooms.rules import Connected
from tests.realtime.conftest import sign_in
from tests.realtime.site import Site
from tests.realtime.test_connection import UVICORN
from tests.support.waiting import eventually

OPEN = RoomRule("open:{name}", subscribe=True, publish=True)


async def test_connect_anonymous(lone_site: Site) -> None:
    """Without a session a client connects, and is told its id and how often it is pinged."""
    node = await lone_site.node(rules=[OPEN])
    async with node.raw() as client:
        reply = await client.call("connect", {"name": "test", "unknown": 1, "flag": 7})
        assert reply["connect"]["client"]
        assert reply["connect"]["ping"] == 25
        assert reply["connect"]["pong"] is True


async def test_publication_reaches_every_node(site: Site) -> None:
    """A broadcast and a client's publication reach every node's subscribers, with the publisher's info."""
    first, second = await site.node(rules=[OPEN]), await site.node(rules=[OPEN])
    cookie = await sign_in(first, "ada")
    async with first.client(cookie) as ada, second.client() as bob:
        for client in (ada, bob):
            assert "subscribe" in await client.call("subscribe", {"channel": "open:a"})
        await first.cluster.room("open:a").broadcast({"n": 1})
        assert await ada.pub() == {"n": 1}
        assert await bob.pub() == {"n": 1}
        assert (await ada.call("publish", {"channel": "open:a", "data": "hi"}))["publish"] == {}
        push = await bob.push()
        assert push["channel"] == "open:a"
        assert push["pub"]["data"] == "hi"
        assert push["pub"]["info"]["user"] == "ada"
        assert await ada.pub() == "hi"


async def test_broadcast_bytes_are_base64(lone_site: Site) -> None:
    """JSON clients get bytes as base64 (the proto3 JSON mapping)."""
    node = await lone_site.node(rules=[OPEN])
    async with node.client() as client:
        await client.call("subscribe", {"channel": "open:a"})
        await node.cluster.room("open:a").broadcast(b"\x00\xff")
        assert await client.pub() == "AP8="


async def test_broadcast_excludes(site: Site) -> None:
    """``exclude`` leaves one connection out, on its own node and on another."""
    node, other = await site.node(rules=[OPEN]), await site.node(rules=[OPEN])
    async with node.raw() as first, node.client() as second:
        client_id = (await first.call("connect", {}))["connect"]["client"]
        for client in (first, second):
            await client.call("subscribe", {"channel": "open:a"})
        await other.cluster.room("open:a").broadcast(1, exclude=client_id)
        await other.cluster.room("open:a").broadcast(2)
        assert await first.pub() == 2
        assert await second.pub() == 1


async def refuse(request: RoomRequest) -> bool:
    if request.room == "rule:reason":
        raise NotPermitted("members only")
    if request.room == "rule:bug":
        raise ZeroDivisionError
    return bool(request.data == {"key": 1})


@pytest.mark.parametrize(
    ("channel", "data", "code", "message"),
    [
        ("none", None, 102, "unknown channel"),
        ("rule:reason", None, 103, "members only"),
        ("rule:no", None, 103, "permission denied"),
        ("closed:a", None, 103, "permission denied"),
        ("", None, 107, "bad request"),
        ("open:" + "a" * 300, None, 107, "bad request"),
        ("open:\n", None, 107, "bad request"),
    ],
)
async def test_subscribe_refused(lone_site: Site, channel: str, data: Any, code: int, message: str) -> None:
    """Each refusal has its code, and the connection goes on."""
    node = await lone_site.node(
        rules=[OPEN, RoomRule("rule:{name}", subscribe=refuse), RoomRule("closed:{x}")]
    )
    async with node.client() as client:
        reply = await client.call("subscribe", {"channel": channel})
        assert reply["error"] == {"code": code, "message": message}
        assert "subscribe" in await client.call("subscribe", {"channel": "rule:yes", "data": {"key": 1}})


async def test_subscribe_rule_fails(lone_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A rule with a bug is logged; the client gets a temporary error and no details."""
    node = await lone_site.node(rules=[RoomRule("rule:{name}", subscribe=refuse)])
    async with node.client() as client:
        reply = await client.call("subscribe", {"channel": "rule:bug"})
        assert reply["error"] == {"code": 100, "message": "internal server error", "temporary": True}
    assert "ZeroDivisionError" in caplog.text


async def test_subscribe_twice_and_too_often(site: Site) -> None:
    """105 for the same room again, 106 beyond ``max_rooms``; unsubscribing makes room."""
    node = await site.node(rules=[OPEN], max_rooms=2)
    async with node.client() as client:
        await client.call("subscribe", {"channel": "open:a"})
        assert (await client.call("subscribe", {"channel": "open:a"}))["error"]["code"] == 105
        await client.call("subscribe", {"channel": "open:b"})
        assert (await client.call("subscribe", {"channel": "open:c"}))["error"]["code"] == 106
        assert (await client.call("unsubscribe", {"channel": "open:a"}))["unsubscribe"] == {}
        assert "subscribe" in await client.call("subscribe", {"channel": "open:c"})
        await node.cluster.room("open:a").broadcast(1)
        await node.cluster.room("open:c").broadcast(2)
        assert (await client.push())["channel"] == "open:c"


async def test_batch_both_ways(lone_site: Site) -> None:
    """Commands joined by newlines are all answered; a subscribe in a batch is done before what follows it."""
    node = await lone_site.node(rules=[OPEN])
    async with node.client() as client:
        await client.send(
            {"id": 11, "subscribe": {"channel": "open:a"}},
            {"id": 12, "subscribe": {"channel": "open:b"}},
            {"id": 13, "publish": {"channel": "open:b", "data": [1]}},
            {"id": 14, "unsubscribe": {"channel": "open:a"}},
        )
        for command_id, name in ((11, "subscribe"), (12, "subscribe"), (13, "publish"), (14, "unsubscribe")):
            assert name in await client.reply(command_id)
        assert await client.pub() == [1]


@pytest.mark.parametrize("name", ["presence", "presence_stats", "history"])
async def test_feature_not_available(lone_site: Site, name: str) -> None:
    """A room without presence or history says 108; to those who are not in it 103."""
    node = await lone_site.node(rules=[OPEN])
    async with node.client() as client:
        assert (await client.call(name, {"channel": "open:a"}))["error"]["code"] == 103
        await client.call("subscribe", {"channel": "open:a"})
        assert (await client.call(name, {"channel": "open:a"}))["error"]["code"] == 108


async def test_unknown_command(lone_site: Site) -> None:
    """A command that this server does not know gets 104, one that is not configured 108, and the connection
    goes on.
    """
    node = await lone_site.node()
    async with node.client() as client:
        assert (await client.call("teleport", {}))["error"]["code"] == 104
        assert (await client.call("rpc", {"method": "none"}))["error"]["code"] == 108
        assert (await client.call("refresh", {"token": ""}))["error"]["code"] == 108
        assert (await client.call("ping", {}))["ping"] == {}


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("", 3501),
        ("nonsense", 3501),
        ("[]", 3501),
        ("null", 3501),
        ('{"id": "x"}', 3501),
        ('{"id": 1, "subscribe": 3}', 3501),
        ('{"id": 0, "subscribe": {"channel": "a"}}', 3501),
        ('{"id": -1, "ping": {}}', 3501),
        ('{"id": 1, "connect": {}}', 3501),
        ('{"connect": {}, "send": {"data": 1}}', 3501),
        ('{"subscribe": {"channel": "open:a"}, "send": {"data": 1}}', 3508),
        (b"\xff\xfe", 3501),
        ("[" * 5000, 3501),
        ('{"id": 1, "rpc": {"data": "%s"}}' % ("x" * 70_000), 1009),
        ('{"send": {"data": 1}}', 3508),
    ],
)
async def test_bad_frame(
    lone_site: Site, caplog: pytest.LogCaptureFixture, frame: str | bytes, code: int
) -> None:
    """What is no command closes the connection with a documented code. Others go on; nothing is an error."""
    node = await lone_site.node(rules=[OPEN])
    async with node.client() as other, node.client() as client:
        await other.call("subscribe", {"channel": "open:a"})
        await client.ws.send(frame)
        assert (await client.closed())[0] == code
        await node.cluster.room("open:a").broadcast(1)
        assert await other.pub() == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_binary_frame(lone_site: Site) -> None:
    """JSON in a binary frame is as good."""
    node = await lone_site.node()
    async with node.raw() as client:
        await client.ws.send(b'{"id": 1, "connect": {}}')
        assert "connect" in await client.reply(1)


async def test_command_before_connect(lone_site: Site) -> None:
    """Connect comes first; anything else is 3501."""
    node = await lone_site.node(rules=[OPEN])
    async with node.raw() as client:
        await client.send({"id": 1, "subscribe": {"channel": "open:a"}})
        assert await client.closed() == (3501, "bad request")


@pytest.mark.parametrize("server", UVICORN)
@pytest.mark.filterwarnings("ignore:.*websockets", "ignore::DeprecationWarning")
async def test_never_connects(lone_site: Site, server: str) -> None:
    """A client that does not send its connect command is closed with 3502."""
    node = await lone_site.node(connect_timeout=0.1, server={"ws": server})
    async with node.raw() as client:
        assert await client.closed() == (3502, "stale")


async def test_too_many_commands(lone_site: Site) -> None:
    """Beyond the rate the connection is closed with 3013."""
    node = await lone_site.node(max_commands_per_second=2)
    async with node.client() as client:
        await client.send(*({"id": n, "ping": {}} for n in range(2, 40)))
        assert await client.closed() == (3013, "too many requests")


async def test_ping_and_pong(lone_site: Site) -> None:
    """Who answers pings stays; who does not is closed with 3012."""
    node = await lone_site.node(ping_interval=0.2, pong_timeout=0.1, rules=[OPEN])
    async with node.client() as alive, node.client() as silent:
        await alive.call("subscribe", {"channel": "open:a"})
        async with asyncio.TaskGroup() as tasks:
            still = tasks.create_task(alive.pub())
            await silent.ws.recv()
            assert (await silent.closed())[0] == 3012
            await node.cluster.room("open:a").broadcast("still here")
        assert still.result() == "still here"


@pytest.mark.parametrize(
    ("origin", "allowed", "accepted"),
    [
        (None, None, True),
        ("same", None, True),
        ("https://evil.example", None, False),
        ("null", None, False),
        ("https://app.example", ["https://app.example"], True),
        ("https://evil.example", ["https://app.example"], False),
        ("same", ["https://app.example"], False),
        ("https://evil.example", ["*"], True),
    ],
)
async def test_origin(lone_site: Site, origin: str | None, allowed: list[str] | None, accepted: bool) -> None:
    """An Origin that is present and not allowed is refused with 403 before the handshake is answered."""
    node = await lone_site.node(allowed_origins=allowed)
    headers = {} if origin is None else {"origin": node.http if origin == "same" else origin}
    if accepted:
        async with node.raw(headers=headers) as client:
            assert "connect" in await client.call("connect", {})
    else:
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with node.raw(headers=headers):
                pass
        assert refused.value.response.status_code == 403


async def test_http_requests(lone_site: Site) -> None:
    """client.js is served with validators; everything else below the path has its status."""
    node = await lone_site.node()
    async with httpx.AsyncClient(base_url=node.http) as http:
        script = await http.get("/realtime/client.js")
        assert script.status_code == 200
        assert script.headers["content-type"] == "text/javascript; charset=utf-8"
        assert "export" in script.text
        assert "set-cookie" not in script.headers
        again = await http.get("/realtime/client.js", headers={"if-none-match": script.headers["etag"]})
        assert again.status_code == 304
        head = await http.head("/realtime/client.js")
        assert head.headers["content-length"] == script.headers["content-length"]
        assert head.content == b""
        assert (await http.post("/realtime/client.js")).status_code == 405
        assert (await http.get("/realtime/websocket")).status_code == 426
        assert (await http.get("/realtime/other")).status_code == 404
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with node.raw(path="/realtime/other"):
            pass
    assert refused.value.response.status_code == 404


async def test_logout_closes_clients(site: Site) -> None:
    """A logout on one node closes the session's clients on every node with 4501, and no one else's."""
    first, second = await site.node(rules=[OPEN]), await site.node(rules=[OPEN])
    cookie = await sign_in(first, "ada")
    async with first.client(cookie) as here, second.client(cookie) as there, second.client() as other:
        async with httpx.AsyncClient(base_url=first.http, headers={"cookie": cookie}) as http:
            receipt = (await http.get("/logout")).json()
        assert receipt == {"closed": 2, "complete": True}
        assert await here.closed() == (4501, "logged out")
        assert await there.closed() == (4501, "logged out")
        assert "subscribe" in await other.call("subscribe", {"channel": "open:a"})
    await eventually(lambda: second.cluster.stats().realtime.connections == 0)
    assert second.cluster.stats().realtime.rooms == 0


@pytest.mark.parametrize(
    "name", ["subscribe", "unsubscribe", "publish", "presence", "history", "sub_refresh"]
)
@pytest.mark.parametrize("kind", ["user", "session"])
async def test_name_of_the_packages_own(site: Site, name: str, kind: str) -> None:
    """No command takes a name that the package uses for itself: the connection limits go on counting."""
    limit: dict[str, Any] = {f"max_connections_per_{kind}": 1}
    node = await site.node(rules=[OPEN], **limit)
    cookie = await sign_in(node, "ada")
    async with node.client(cookie) as client:
        (connection,) = node.connections
        own = f"\x1f{kind}\x1f{'ada' if kind == 'user' else connection.session.handle}"
        assert own in connection._present
        reply = await client.call(name, {"channel": own, "data": 1})
        assert reply["error"] == {"code": 107, "message": "bad request"}
        async with node.raw(cookie) as second:
            await second.send({"id": 1, "connect": {}})
            assert await second.drained() == (3504, "connection limit")
        with pytest.raises(ValueError, match="control characters"):
            await connection.leave(own)  # an app may pass on what a client sent


@pytest.mark.parametrize("seen", [0, 2])
async def test_position_without_epoch(site: Site, seen: int) -> None:
    """Who does not know the epoch means the present one, in ``history`` and when it recovers."""
    node = await site.node(rules=[RoomRule("kept", subscribe=True, history=10)])
    offsets = [0]
    for number in range(1, 5):
        position = await node.cluster.room("kept").broadcast(number)
        assert position is not None
        offsets.append(position.offset)
    offset, wanted = offsets[seen], list(range(seen + 1, 5))
    async with node.client() as client:
        recover = {"channel": "kept", "recover": True, "offset": offset, "epoch": ""}
        result = (await client.call("subscribe", recover))["subscribe"]
        assert result["recovered"]
        assert [pub["data"] for pub in result["publications"]] == wanted
        for since in ({"offset": offset}, {"offset": offset, "epoch": ""}, {"offset": offset, "epoch": None}):
            page = await client.call("history", {"channel": "kept", "limit": -1, "since": since})
            assert [pub["data"] for pub in page["history"]["publications"]] == wanted
        other = {"offset": offset, "epoch": "other"}
        reply = await client.call("history", {"channel": "kept", "limit": -1, "since": other})
        assert reply["error"]["code"] == 112


@pytest.mark.parametrize("huge", [1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30])
async def test_numbers_above_every_offset(site: Site, caplog: pytest.LogCaptureFixture, huge: int) -> None:
    """A ``limit`` that no room reaches is no limit. A position after all others is not recoverable (112), and
    everything is before it. The app gets the same.
    """
    node = await site.node(rules=[RoomRule("kept", subscribe=True, history=10)])
    room = node.cluster.room("kept")
    for number in range(3):
        await room.broadcast(number)
    epoch = (await room.history(limit=0)).epoch
    async with node.client() as client:
        for named in ("", epoch):
            recover = {"channel": "kept", "recover": True, "offset": huge, "epoch": named}
            assert not (await client.call("subscribe", recover))["subscribe"].get("recovered")
            page = await client.call("history", {"channel": "kept", "limit": huge})
            assert [pub["data"] for pub in page["history"]["publications"]] == [0, 1, 2]
            since = {"channel": "kept", "limit": -1, "since": {"offset": huge, "epoch": named}}
            assert (await client.call("history", since))["error"]["code"] == 112
            page = await client.call("history", {**since, "limit": huge, "reverse": True})
            assert [pub["data"] for pub in page["history"]["publications"]] == [2, 1, 0]
            await client.call("unsubscribe", {"channel": "kept"})
    kept = await room.history(limit=huge, since=Position(huge, epoch), reverse=True)
    assert [publication.data for publication in kept.publications] == [2, 1, 0]
    assert not (await room.history(limit=huge, since=Position(huge, epoch))).publications
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("offset", [-1, -5, -(1 << 64)])
async def test_negative_offset(site: Site, caplog: pytest.LogCaptureFixture, offset: int) -> None:
    """No position: error 107 to a client that asks for history, ``ValueError`` to the app; and with
    ``recover`` it is not recovered.
    """
    node = await site.node(rules=[RoomRule("kept", subscribe=True, history=10)])
    room = node.cluster.room("kept")
    await room.broadcast(0)
    async with node.client() as client:
        recover = {"channel": "kept", "recover": True, "offset": offset, "epoch": ""}
        assert not (await client.call("subscribe", recover))["subscribe"].get("recovered")
        since = {"channel": "kept", "limit": -1, "since": {"offset": offset, "epoch": ""}}
        assert (await client.call("history", since))["error"] == {"code": 107, "message": "bad request"}
    with pytest.raises(ValueError, match="at least 0"):
        await room.history(since=Position(offset, "any"))
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_null_is_absent(lone_site: Site) -> None:
    """``null`` stands for a field that is not there, as in proto3 JSON, at every level; in ``data`` it is
    data.
    """
    node = await lone_site.node(
        rules=[RoomRule("kept", subscribe=True, publish=True, history=10)],
        rpc={"echo": lambda connection, data: [data]},
    )
    async with node.raw() as client:
        connect = {
            "token": None,
            "data": None,
            "name": None,
            "headers": {"a": None},
            "subs": {"a": {"offset": None}, "b": None},
        }
        assert "connect" in await client.call("connect", {**connect, "unknown": None})
        nothing = {"recover": None, "epoch": None, "offset": None, "data": None, "flag": None, "tf": None}
        assert "subscribe" in await client.call("subscribe", {"channel": "kept", **nothing, "type": None})
        assert "publish" in await client.call("publish", {"channel": "kept", "data": None, "key": None})
        assert await client.pub() is None
        assert (await client.call("rpc", {"method": "echo", "data": None}))["rpc"]["data"] == [None]
        since = {"channel": "kept", "limit": None, "since": None, "reverse": None}
        page = await node.cluster.room("kept").history()
        assert (await client.call("history", since))["history"]["offset"] == page.offset > 0
        assert (await client.call("publish", {"channel": None, "data": 1}))["error"]["code"] == 107
        assert "unsubscribe" in await client.call("unsubscribe", {"channel": "kept"})
        assert "subscribe" in await client.call("subscribe", {"channel": "kept", "tf": None})
        await client.send({"id": 70, "connect": None, "ping": {}})
        assert (await client.reply(70))["ping"] == {}


@pytest.mark.parametrize("error", [NotPermitted("no"), TokenExpired(), ZeroDivisionError()])
@pytest.mark.parametrize("slow", [False, True])
async def test_commands_behind_a_connect_that_fails(lone_site: Site, error: Exception, slow: bool) -> None:
    """The error of the connect command is what the client gets: the rest of its frame is dropped, and the
    connection is not closed for it. A command after that is 3501.
    """

    async def connect(request: ConnectRequest) -> None:
        for _ in range(20 if slow else 0):
            await asyncio.sleep(0)
        raise error

    node = await lone_site.node(connect=connect, rules=[OPEN])
    async with node.raw() as client:
        rest = [{"id": n, "subscribe": {"channel": f"open:{n}"}} for n in range(2, 30)]
        await client.send({"id": 1, "connect": {}}, *rest)
        assert (await client.reply(1))["error"]["code"] in (100, 103, 109)
        await client.send({"id": 40, "ping": {}})
        assert await client.drained() == (3501, "bad request")
        assert not client.replies
    assert node.cluster.stats().realtime.rooms == 0


@pytest.mark.parametrize("server", UVICORN)
@pytest.mark.filterwarnings("ignore:.*websockets", "ignore::DeprecationWarning")
async def test_protobuf_only(lone_site: Site, server: str, caplog: pytest.LogCaptureFixture) -> None:
    """A client that speaks only Protobuf is closed with 3506, which is final for SDKs and names the reason;
    one log line for all of them. One that speaks JSON as well is served.
    """
    node = await lone_site.node(server={"ws": server})
    for _ in range(2):
        async with node.raw(subprotocols=["centrifuge-protobuf"]) as client:
            assert client.ws.subprotocol == "centrifuge-protobuf"
            assert await client.drained() == (3506, "inappropriate protocol: JSON only")
    async with node.raw(subprotocols=["centrifuge-protobuf", "centrifuge-json"]) as client:
        assert client.ws.subprotocol == "centrifuge-json"
        assert "connect" in await client.call("connect", {})
    ours = [record.message for record in caplog.records if record.name.startswith("asgi_cluster")]
    assert len(ours) == 1
    assert "centrifuge-protobuf" in ours[0]


@pytest.mark.parametrize(
    ("name", "request_", "what"),
    [
        ("subscribe", {"type": 1}, "map"),
        ("subscribe", {"type": 2}, "map"),
        ("subscribe", {"type": 4}, "shared poll"),
        ("subscribe", {"phase": 2}, "map"),
        ("subscribe", {"cursor": "x"}, "map"),
        ("subscribe", {"tf": {"op": "eq", "key": "a", "val": "b"}}, "tags filters"),
        ("subscribe", {"token": "jwt"}, "subscription tokens"),
        ("publish", {"type": 1, "key": "a", "data": 1}, "map publications"),
        ("publish", {"key": "a", "data": 1}, "map publications"),
        ("publish", {"removed": True, "data": 1}, "map publications"),
        ("sub_refresh", {"type": 1, "track": []}, ""),
    ],
)
async def test_not_supported(lone_site: Site, name: str, request_: dict[str, Any], what: str) -> None:
    """What this server does not do is refused with 108 and named, and nothing happens in its place."""
    node = await lone_site.node(rules=[RoomRule("room", subscribe=True, publish=True, history=10)])
    async with node.client() as client:
        error = (await client.call(name, {"channel": "room", **request_}))["error"]
        assert error["code"] == 108
        assert what in error["message"]
        assert "subscribe" in await client.call("subscribe", {"channel": "room", "flag": 1})
        assert not (await node.cluster.room("room").history()).publications


async def test_offers_of_sdks(lone_site: Site) -> None:
    """What an SDK merely offers (delta, positions, compact channels) is not in force, and the result says
    so.
    """
    node = await lone_site.node(rules=[RoomRule("room", subscribe=True)])
    async with node.client() as client:
        offers = {"flag": 1, "delta": "fossil", "positioned": True, "recoverable": True, "join_leave": True}
        assert (await client.call("subscribe", {"channel": "room", **offers}))["subscribe"] == {}
        await node.cluster.room("room").broadcast({"a": 1})
        assert await client.push() == {"channel": "room", "pub": {"data": {"a": 1}}}


async def test_token_expired_and_invalid(lone_site: Site) -> None:
    """``TokenExpired`` is error 109, and 3005 for a refresh; an invalid token closes with 3500."""

    def connect(request: ConnectRequest) -> Connected:
        match request.token:
            case "expired":
                raise TokenExpired
            case "invalid":
                raise NotPermitted("invalid token", code=3500)
        return Connected(user_id="ada", expires_in=60)

    node = await lone_site.node(connect=connect)
    async with node.raw() as client:
        reply = await client.call("connect", {"token": "expired"})
        assert reply["error"] == {"code": 109, "message": "token expired"}
    async with node.raw() as client:
        await client.send({"id": 1, "connect": {"token": "invalid"}})
        assert await client.drained() == (3500, "invalid token")
    for token, closed in (("expired", (3005, "connection expired")), ("invalid", (3500, "invalid token"))):
        async with node.raw() as client:
            assert "connect" in await client.call("connect", {"token": "good"})
            await client.send({"id": 2, "refresh": {"token": token}})
            assert await client.drained() == closed
    with pytest.raises(ValueError, match="3500"):
        NotPermitted("no", code=4000)


@pytest.mark.parametrize("session", [None, "eve"])
@pytest.mark.parametrize("token", ["", "fallback", "bob"])
async def test_refresh_of_another_user(lone_site: Site, session: str | None, token: str) -> None:
    """A refresh whose answer does not mean the user of the connection ends it with 3500: a hook that returns
    None, or the handshake's user, means that user at a refresh as it does when a client connects.
    """
    asked: list[str | None] = []

    def connect(request: ConnectRequest) -> Connected | None:
        asked.append(request.user_id)
        if not request.token:
            return None
        user = request.user_id if request.token == "fallback" else request.token
        return Connected(user_id=user, expires_in=60)

    node = await lone_site.node(
        connect=connect, rules=[OPEN], cluster={"identify": lambda scope: session} if session else {}
    )
    async with node.raw() as client:
        assert "connect" in await client.call("connect", {"token": "ada"})
        assert (await client.call("refresh", {"token": "ada"}))["refresh"]["ttl"] == 60
        await client.send({"id": 9, "refresh": {"token": token}})
        assert await client.drained() == (3500, "invalid token")
    assert asked == [session] * 3


async def test_refresh_by_the_session(lone_site: Site) -> None:
    """A refresh without a token is good where the handshake names the same user, and ends the expiry."""

    def connect(request: ConnectRequest) -> Connected | None:
        return Connected(user_id=request.token, expires_in=60) if request.token else None

    node = await lone_site.node(connect=connect, cluster={"identify": lambda scope: "ada"})
    async with node.raw() as client:
        assert "connect" in await client.call("connect", {"token": "ada"})
        assert "ttl" not in (await client.call("refresh", {}))["refresh"]
        assert (await client.call("refresh", {}))["error"]["code"] == 108  # it does not expire any more


async def test_connect_again_after_an_error(site: Site) -> None:
    """A connect command that fails while its rooms are entered leaves nothing: no room, no presence, no
    count, no connection. Commands are refused, the hooks hear of no connection, and the client may connect
    again on the same socket.
    """
    told: list[str] = []
    rooms = iter((["kept:a", "not\na room"], ["kept:a", "not\na room"], ["kept:a"], ["kept:a"]))
    node = await site.node(
        connect=lambda request: Connected(user_id="ada", rooms=next(rooms)),
        rules=[RoomRule("kept:{name}", subscribe=True, presence=True, history=5)],
        on_connect=lambda connection: told.append("on_connect"),
        on_disconnect=lambda connection, code, reason: told.append(f"on_disconnect {code}"),
        max_connections_per_user=1,
    )
    room = node.cluster.room("kept:a")
    async with node.raw() as client:
        assert (await client.call("connect", {}))["error"]["code"] == 100
        assert node.cluster.stats().realtime.rooms == 0
        assert not await room.presence()
        await client.send({"id": 9, "subscribe": {"channel": "kept:a"}})
        assert await client.drained() == (3501, "bad request")
    await eventually(lambda: not node.cluster.stats().realtime.connections)
    assert told == []
    async with node.raw() as client:
        assert (await client.call("connect", {}))["error"]["code"] == 100
        async with node.raw() as other:
            assert "connect" in await other.call("connect", {})
            assert len(await room.presence()) == 1
        await eventually(lambda: told == ["on_connect", "on_disconnect 1000"])
        assert (await client.call("connect", {}))["connect"]["subs"]["kept:a"]["positioned"]
        await room.broadcast(1)
        assert await client.pub() == 1
    await eventually(lambda: told == ["on_connect", "on_disconnect 1000"] * 2)


@pytest.mark.parametrize("server", UVICORN)
@pytest.mark.filterwarnings("ignore:.*websockets", "ignore::DeprecationWarning")
async def test_nothing_comes_before_the_connect_reply(
    site: Site, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is broadcast to a server-side room while the next one is entered comes after the connect reply,
    right after the position that the reply gives: at a first connect, and when the client comes back.
    """
    node = await site.node(
        connect=lambda request: Connected(user_id="ada", rooms=["kept:a", "kept:b", "plain"]),
        rules=[RoomRule("kept:{name}", subscribe=True, history=50), RoomRule("plain", subscribe=True)],
        server={"ws": server},
    )
    first = node.cluster.room("kept:a")
    await first.broadcast("old")
    async with node.raw() as observer:
        await observer.call("connect", {})
        enter = node.cluster._parts.rooms.memberships.enter

        async def enter_slowly(connection: Any, room: str, **options: Any) -> Any:
            if room != "kept:a":
                await first.broadcast(f"before {room}")
                assert await observer.pub() == f"before {room}"
            return await enter(connection, room, **options)

        monkeypatch.setattr(node.cluster._parts.rooms.memberships, "enter", enter_slowly)
        subs: dict[str, Any] = {}
        for _ in range(2):
            async with node.raw() as client:
                await client.send({"id": 1, "connect": {"subs": subs}})
                lines = str(await client.ws.recv()).split("\n")
                reply = json.loads(lines[0])
                assert reply["id"] == 1, lines
                for line in lines[1:]:
                    client.pushes.append(json.loads(line)["push"])
                result = reply["connect"]["subs"]["kept:a"]
                pushes = [await client.push() for _ in range(2)]
                assert [push["pub"]["data"] for push in pushes] == ["before kept:b", "before plain"]
                offsets = [push["pub"]["offset"] for push in pushes]
                assert offsets == [result["offset"] + 1, result["offset"] + 2]
                if subs:
                    assert result["recovered"] is True
                    assert [pub["data"] for pub in result["publications"]] == ["missed"]
                position = {"recover": True, "epoch": result["epoch"], "offset": offsets[-1]}
                subs = {"kept:a": position}
            await first.broadcast("missed")
            assert await observer.pub() == "missed"


async def test_close_before_the_connect_reply(lone_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is closed while its rooms are entered gets the close at once, and nothing before it; the
    hooks hear of no connection.
    """
    told: list[Any] = []
    entering, stay = asyncio.Event(), asyncio.Event()
    node = await lone_site.node(
        connect=lambda request: Connected(user_id="ada", rooms=["open:a", "open:b"]),
        rules=[OPEN],
        on_connect=told.append,
        on_disconnect=lambda *arguments: told.append(arguments),
        close_timeout=30,
    )
    enter = node.cluster._parts.rooms.memberships.enter

    async def enter_slowly(connection: Any, room: str, **options: Any) -> Any:
        if room == "open:b":
            await node.cluster.room("open:a").broadcast(1)
            entering.set()
            await stay.wait()
        return await enter(connection, room, **options)

    monkeypatch.setattr(node.cluster._parts.rooms.memberships, "enter", enter_slowly)
    async with node.raw() as client:
        await client.send({"id": 1, "connect": {}})
        await entering.wait()
        (connection,) = node.connections
        await connection.close(3503, "out")
        with pytest.raises(websockets.ConnectionClosed):
            await asyncio.wait_for(client.ws.recv(), 10)
        assert (client.ws.close_code, client.ws.close_reason) == (3503, "out")
    await eventually(lambda: not node.cluster.stats().realtime.connections)
    assert told == []


async def broken(*arguments: Any) -> None:
    raise ZeroDivisionError


async def cancelled_inside(*arguments: Any) -> None:
    """Waits for a task that was cancelled."""
    inner = asyncio.ensure_future(asyncio.sleep(0))
    inner.cancel()
    await inner


def cancelled_at_once(*arguments: Any) -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("fails", [broken, cancelled_inside, cancelled_at_once])
@pytest.mark.parametrize(
    ("name", "request_", "line"),
    [
        ("subscribe", {"channel": "rule:1"}, "subscribe of room rule 'rule:{id}', for room 'rule:1'"),
        ("publish", {"channel": "rule:1", "data": 1}, "publish of room rule 'rule:{id}', for room 'rule:1'"),
        ("rpc", {"method": "broken"}, "the rpc function 'broken'"),
        ("send", {"data": 1}, "the on_message hook"),
        ("connect", {}, "the connect hook"),
        ("on_connect", {}, "the on_connect hook"),
        ("on_disconnect", {}, "the on_disconnect hook"),
    ],
)
async def test_log_line_of_a_failed_hook(
    lone_site: Site,
    caplog: pytest.LogCaptureFixture,
    fails: Callable[..., Any],
    name: str,
    request_: dict[str, Any],
    line: str,
) -> None:
    """It names what failed, the rule and the room or the method, and the user: also when the hook raises the
    CancelledError of a task of its own.
    """
    hooks: dict[str, Any] = {name: fails} if name.startswith("on_") or name == "connect" else {}
    node = await lone_site.node(
        rules=[RoomRule("rule:{id}", subscribe=fails, publish=fails)],
        rpc={"broken": fails},
        cluster={"identify": lambda scope: "ada"},
        **{"on_message": fails, **hooks},
    )
    async with node.raw() as client:
        await client.send({"id": 1, "connect": {}})
        if name == "send":
            await client.send({"send": request_})
        elif request_:
            await client.send({"id": 2, name: request_})
            assert (await client.reply(2))["error"]["code"] == 100
        if name == "on_connect":
            assert await client.drained() == (3004, "internal server error")
        else:
            await client.reply(1)
    await eventually(lambda: [record for record in caplog.records if record.levelname == "ERROR"])
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.message.startswith(f"{line}, called by user 'ada' failed")
    assert record.exc_info is not None


@pytest.mark.parametrize("answer", ["no", None, 1, [], "yes"])
async def test_rule_that_returns_no_bool(
    lone_site: Site, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Only True permits. What is no bool refuses, and the log names the rule and the room."""

    async def later(request: RoomRequest) -> Any:
        return answer

    node = await lone_site.node(
        rules=[RoomRule("rule:{id}", subscribe=lambda request: answer, publish=later, history=1)]
    )
    async with node.client() as client:
        assert (await client.call("subscribe", {"channel": "rule:1"}))["error"]["code"] == 103
        assert (await client.call("publish", {"channel": "rule:1", "data": 1}))["error"]["code"] == 103
    assert node.cluster.stats().realtime.rooms == 0
    lines = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(lines) == 2
    for line, name in zip(lines, ("subscribe", "publish"), strict=True):
        assert line == (
            f"the {name} function of room rule 'rule:{{id}}' returned {answer!r}, and must return True or "
            "False: the client was refused (103) for room 'rule:1' (its user: none)"
        )
