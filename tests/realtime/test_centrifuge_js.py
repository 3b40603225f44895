"""The maintained JavaScript SDK, unchanged, on Node with ``ws``, against the endpoint."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from asgi_cluster import ConnectRequest, RoomRule, TokenExpired
from tests.realtime.conftest import sign_in
from tests.realtime.site import Node, Site
from tests.support.machine import lacking, program
from tests.support.waiting import eventually

PACKAGES = ["centrifuge@5", "ws@8"]
OPEN = RoomRule("open:{name}", subscribe=True, publish=True)
KEPT = RoomRule("kept:{name}", subscribe=True, publish=True, history=100, presence=True, join_leave=True)


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the SDK is installed."""
    npm, folder = program("npm"), tmp_path_factory.mktemp("npm")
    installed = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--silent", *PACKAGES],
        cwd=folder,
        capture_output=True,
        timeout=120,
        check=False,
    )
    if installed.returncode:
        lacking("npm packages centrifuge and ws (npm install failed)")
    return folder


class Sdk:
    """A process with one client in it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.events: list[dict[str, Any]] = []

    async def do(self, command: str, **options: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **options}).encode() + b"\n")
        await self._process.stdin.drain()

    async def listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.events.append(json.loads(line))

    def seen(self, event: str, **fields: Any) -> int:
        """How often an event with these fields came."""
        wanted = {"event": event, **fields}
        return sum(wanted.items() <= event.items() for event in self.events)

    async def wait(self, event: str, **fields: Any) -> None:
        await eventually(
            lambda: self.seen(event, **fields), message=f"no {event} {fields}: {self.events[-5:]}"
        )


@asynccontextmanager
async def sdk(modules: Path, node: Node, cookie: str = "", token: str = "") -> AsyncIterator[Sdk]:
    """A connected client; with ``token`` it fetches "new" when that has expired."""
    script = Path(__file__).with_name("sdk.mjs")
    process = await asyncio.create_subprocess_exec(
        program("node"),
        str(script),
        str(modules),
        node.endpoint,
        cookie,
        token,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    client = Sdk(process)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(client.listen())
        try:
            await client.do("connect")
            await client.wait("connected")
            yield client
        finally:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()


async def test_publish_and_receive(site: Site, modules: Path) -> None:
    """Two clients on two nodes exchange a message, with the publisher's user."""
    first, second = await site.node(rules=[OPEN]), await site.node(rules=[OPEN])
    cookie = await sign_in(first, "ada")
    async with sdk(modules, first, cookie) as ada, sdk(modules, second) as bob:
        for client in (ada, bob):
            await client.do("subscribe", room="open:a")
            await client.wait("subscribed", room="open:a")
        await ada.do("publish", room="open:a", data={"n": 1})
        for client in (ada, bob):
            await client.wait("publication", data={"n": 1}, user="ada")


async def test_refusals_and_logout(lone_site: Site, modules: Path) -> None:
    """A refused room is told with 103 and no more; a logout is terminal with 4501."""
    node = await lone_site.node(rules=[OPEN, RoomRule("closed")])
    cookie = await sign_in(node, "ada")
    async with sdk(modules, node, cookie) as client:
        await client.do("subscribe", room="closed")
        await client.wait("unsubscribed", room="closed", code=103)
        await client.do("rpc", method="none")
        await client.wait("error", command="rpc", code=108)
        async with httpx.AsyncClient(base_url=node.http, headers={"cookie": cookie}) as http:
            await http.get("/logout")
        await client.wait("disconnected", code=4501, reason="logged out")
        assert client.seen("connecting") == 1


async def test_recovers_after_a_cut(site: Site, modules: Path) -> None:
    """A cut connection comes back and misses nothing; history, presence, joins and leaves work."""
    node = await site.node(rules=[KEPT])
    ada, bob = await sign_in(node, "ada"), await sign_in(node, "bob")
    async with sdk(modules, node, ada) as client:
        await client.do("subscribe", room="kept:a")
        await client.wait("subscribed", room="kept:a", wasRecovering=False)
        room = node.cluster.room("kept:a")
        await room.broadcast(0)
        await client.wait("publication", data=0)
        await client.do("cut")
        for number in range(1, 5):
            await room.broadcast(number)
        await client.wait("subscribed", room="kept:a", wasRecovering=True, recovered=True)
        await client.wait("publication", data=4)
        data = [event["data"] for event in client.events if event["event"] == "publication"]
        assert data == [0, 1, 2, 3, 4]
        async with sdk(modules, node, bob) as other:
            await other.do("subscribe", room="kept:a")
            await client.wait("join", user="bob")
            await client.do("presence", room="kept:a")
            await client.wait("presence")
            assert sorted(client.events[-1]["users"]) == ["ada", "bob"]
        await client.wait("leave", user="bob")
        await client.do("history", room="kept:a", limit=2)
        await client.wait("history", data=[0, 1])


async def test_shutdown_reconnects(lone_site: Site, modules: Path) -> None:
    """3001 makes the client come back."""
    node = await lone_site.node(rules=[OPEN])
    async with sdk(modules, node) as client:
        await node.cluster._parts.hub.drain(0.01)
        await client.wait("connecting", code=3001)
        await eventually(lambda: client.seen("connected") == 2)


async def test_expired_token_is_fetched_anew(lone_site: Site, modules: Path) -> None:
    """``TokenExpired``: the SDK fetches a token and connects with it."""
    seen: list[str] = []

    def connect(request: ConnectRequest) -> str:
        seen.append(request.token)
        if request.token == "expired":
            raise TokenExpired
        return "ada"

    node = await lone_site.node(connect=connect, rules=[OPEN])
    async with sdk(modules, node, token="expired") as client:
        assert seen == ["expired", "new"]
        assert not client.seen("disconnected")


async def test_what_is_not_supported(lone_site: Site, modules: Path) -> None:
    """A tags filter ends the subscription with 108; delta is an offer, and whole messages arrive."""
    node = await lone_site.node(rules=[OPEN])
    async with sdk(modules, node) as client:
        tags = {"op": "", "cmp": "eq", "key": "a", "val": "b"}
        await client.do("subscribe", room="open:a", options={"tagsFilter": tags})
        await client.wait("unsubscribed", room="open:a", code=108)
        await client.do("subscribe", room="open:b", options={"delta": "fossil"})
        await client.wait("subscribed", room="open:b")
        await node.cluster.room("open:b").broadcast({"whole": True})
        await client.wait("publication", room="open:b", data={"whole": True})
