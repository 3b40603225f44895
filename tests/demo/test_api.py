"""The demo's API, as scripts use it, on three nodes."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from tests.demo.running import Demo
from tests.demo.visitors import ask, realtime, visitor

LIMITS = [
    {"text": "x" * 501},
    {"text": 7},
    {"x": 1.5},
    {"y": "0"},
    {"x": True},
    {"colour": "url(evil)"},
    {"version": 9},
    [],
]


async def pushed(socket: ClientConnection) -> dict[str, Any]:
    while True:
        for line in str(await socket.recv()).splitlines():
            push = json.loads(line).get("push", {})
            if "pub" in push:
                data: dict[str, Any] = push["pub"]["data"]
                return data


async def closed(socket: ClientConnection) -> None:
    """Read what is left until the other side closes."""
    with suppress(ConnectionClosed):
        while True:
            await socket.recv()


async def test_session_is_one_on_all_nodes(demo: Demo) -> None:
    """Signed in on one node, known on the others; signed out on one, unknown on all."""
    async with visitor(demo) as client:
        assert (await client.get("/api/me")).json() == {"user": None, "node": "node-1", "handle": None}
        signed_in = (await client.post("/api/login", json={"name": "  Ada \t Lovelace "})).json()
        assert signed_in["user"] == "Ada Lovelace"
        for number in (1, 2, 3):
            me = (await client.get(demo.node_url(number) + "/api/me")).json()
            assert me == {"user": "Ada Lovelace", "node": f"node-{number}", "handle": signed_in["handle"]}
        out = (await client.post(demo.node_url(2) + "/api/logout")).json()
        assert out["user"] is None
        assert (out["nodes"], out["complete"]) == (3, True)
        for number in (1, 2, 3):
            assert (await client.get(demo.node_url(number) + "/api/me")).json()["user"] is None


async def test_logout_closes_sockets_on_all_nodes(demo: Demo) -> None:
    """4501 on every node, with who and where as the reason."""
    async with (
        visitor(demo, "Ada") as client,
        realtime(demo, 1, client) as one,
        realtime(demo, 2, client) as two,
        realtime(demo, 3, client) as three,
    ):
        answer = (await client.post("/api/logout")).json()
        assert answer["sockets_closed"] == 3
        for socket in (one, two, three):
            await closed(socket)
            assert (socket.close_code, socket.close_reason) == (4501, "Ada signed out on node-1")


async def test_logout_ends_the_user_on_every_device(demo: Demo) -> None:
    """The user's other sessions end too, with their sockets on any node; other users' do not."""
    async with (
        visitor(demo, "Ada") as laptop,
        visitor(demo, "Ada") as phone,
        visitor(demo, "Grace") as other,
        realtime(demo, 2, laptop) as one,
        realtime(demo, 3, phone) as two,
        realtime(demo, 3, other) as three,
    ):
        answer = await laptop.post("/api/logout")
        assert (answer.json()["complete"], answer.json()["sockets_closed"]) == (True, 2)
        assert "demo" not in laptop.cookies
        for socket in (one, two):
            await closed(socket)
            assert (socket.close_code, socket.close_reason) == (4501, "Ada signed out on node-1")
        for number in (1, 2, 3):
            assert (await phone.get(demo.node_url(number) + "/api/me")).json()["user"] is None
        assert (await other.get("/api/me")).json()["user"] == "Grace"
        reply = await ask(three, 2, {"subscribe": {"channel": "board:lobby"}})
        assert "error" not in reply


async def test_change_reaches_subscribers_on_another_node(demo: Demo) -> None:
    """Adding, editing and deleting a note on one node are announced on another, with growing versions."""
    async with visitor(demo, "Ada") as client, realtime(demo, 2, client) as socket:
        reply = await ask(socket, 2, {"subscribe": {"channel": "board:lobby"}})
        assert "error" not in reply
        note = (await client.post("/api/board/notes", json={"text": "hello", "x": 0.25, "y": 0.5})).json()
        assert await pushed(socket) == {"type": "note", "note": note}
        url = demo.node_url(3) + f"/api/board/notes/{note['id']}"
        moved = (await client.patch(url, json={"x": 1})).json()
        assert moved == {**note, "x": 1, "version": note["version"] + 1, "edited_by": "Ada"}
        assert await pushed(socket) == {"type": "note", "note": moved}
        board = (await client.get("/api/board")).json()
        assert board["version"] == moved["version"]
        assert moved in board["notes"]
        gone = (await client.delete(url)).json()
        assert await pushed(socket) == {"type": "gone", "id": note["id"], "version": moved["version"] + 1}
        assert gone["version"] == moved["version"] + 1
        assert (await client.patch(url, json={"x": 0})).status_code == 404


async def test_room_is_closed_to_visitors_who_are_not_signed_in(demo: Demo) -> None:
    """Error 103 for subscribe and publish, and 401 from the API."""
    async with visitor(demo) as client, realtime(demo, 1, client) as socket:
        reply = await ask(socket, 2, {"subscribe": {"channel": "board:lobby"}})
        assert reply["error"]["code"] == 103
        reply = await ask(socket, 3, {"publish": {"channel": "board:lobby", "data": {}}})
        assert reply["error"]["code"] == 103
        assert (await client.get("/api/board")).status_code == 401
        assert (await client.post("/api/board/notes", json={"text": "x"})).status_code == 401
        assert (await client.delete("/api/board/notes/x")).status_code == 401


@pytest.mark.parametrize("fields", LIMITS, ids=str)
async def test_note_out_of_bounds_is_refused(demo: Demo, fields: Any) -> None:
    """Unknown fields, long texts, places off the board and made-up colours: 422, and nothing is stored."""
    async with visitor(demo, "Ada") as client:
        before = (await client.get("/api/board")).json()
        answer = await client.post("/api/board/notes", json=fields)
        assert answer.status_code == 422
        assert answer.json()["error"]
        assert (await client.get("/api/board")).json() == before


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
async def test_note_with_a_number_that_is_none_is_refused(demo: Demo, number: str) -> None:
    """Python's JSON reads NaN; nobody else's does, and the board would be unreadable for all."""
    async with visitor(demo, "Ada") as client:
        answer = await client.post(
            "/api/board/notes", content=f'{{"x": {number}}}', headers={"content-type": "application/json"}
        )
        assert answer.status_code == 422


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"[" * 8000, "application/json", 400),
        (b" " * 9000, "application/json", 413),
        (b'{"name": "Ada"}', "text/plain", 415),
        (b'{"name": ""}', "application/json", 422),
        (b'{"name": "a\\u0000b"}', "application/json", 422),
        (b'{"name": 7}', "application/json", 422),
        (b"null", "application/json", 422),
    ],
)
async def test_bad_login_is_refused(demo: Demo, content: bytes, kind: str, status: int) -> None:
    """Each has its status and a sentence; none signs anybody in."""
    async with visitor(demo) as client:
        answer = await client.post("/api/login", content=content, headers={"content-type": kind})
        assert answer.status_code == status
        assert answer.json()["error"]
        assert (await client.get("/api/me")).json()["user"] is None


async def test_request_of_another_site_is_refused(demo: Demo) -> None:
    """Cookies do not tell ports of one host apart; the Origin header does."""
    async with visitor(demo, "Ada") as client:
        answer = await client.post("/api/logout", headers={"origin": f"http://127.0.0.1:{demo.port + 2}"})
        assert answer.status_code == 403
        assert (await client.get("/api/me")).json()["user"] == "Ada"


async def test_stats_tell_of_every_node(demo: Demo) -> None:
    """Cache, lease, and the sockets of each node."""
    async with visitor(demo, "Ada") as client:
        for _ in range(5):
            await client.get("/api/me")
        stats = (await client.get("/api/stats")).json()
    assert stats["node"] == "node-1"
    assert stats["cache"]["hits"] >= 3
    assert 0 < stats["cache"]["hit_rate"] <= 1
    assert 0 < stats["bus"]["lease_remaining"] <= 2
    assert [node["node"] for node in stats["nodes"]] == ["node-1", "node-2", "node-3"]


async def test_page_forbids_foreign_and_inline_code(demo: Demo) -> None:
    """A strict policy on the page, and nothing inline in it that would need a looser one."""
    async with visitor(demo) as client:
        page = await client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert "unsafe" not in page.headers["content-security-policy"]
    for inline in (" onclick=", " style=", "<style", "<script>", "https://", "http://"):
        assert inline not in page.text
