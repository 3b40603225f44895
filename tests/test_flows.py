"""The two flows of ARCHITECTURE.md, walked: a request that changes its session, and a broadcast to a room."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_cluster import RoomRule
from tests.realtime.site import Site
from tests.support.machine import ROOT
from tests.support.passage import Passage

ASIDE: Mapping[str, Mapping[str, str]] = {
    "request": {
        "backends/redis/names.py": "the names of keys and channels",
        "backends/redis/records.py": "the fields of a record",
        "bus/messages.py": "the bytes of the invalidation",
        "ids.py": "the hash of the cookie's secret, the write's id",
        "node.py": "whether the node is started",
        "scope.py": "the place of the session in the scope",
        "sessions/codec.py": "the bytes of a value",
        "tasks.py": "which loop this is",
    },
    "event": {
        "backends/redis/names.py": "the room of a channel",
        "bus/messages.py": "the fields of a message",
        "centrifuge/wire.py": "the form that the client's protocol gives a message",
        "rooms/history.py": "the fields of a publication",
    },
}
"""What a flow passes without being named in ARCHITECTURE.md: it only answers a question, which is this."""


def documented(flow: str) -> list[str]:
    """The modules on the flow's line of ARCHITECTURE.md."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    (line,) = re.findall(rf"^{flow} +(\S+\.py(?: → \S+\.py)+)$", text, re.MULTILINE)
    return str(line).split(" → ")


def check(flow: str, passage: Passage) -> None:
    """The documented modules are passed in their order, and no other that is more than an aside."""
    passed, aside = passage.modules, ASIDE[flow]
    stations = [module for module in passed if module not in aside]
    assert documented(flow) == stations, (
        "ARCHITECTURE.md has another line than the code. Write this one, or put what only answers a question "
        f"into ASIDE:\n{flow}   {' → '.join(stations)}"
    )
    assert set(aside) <= set(passed), "ASIDE has what is not passed any more"


@pytest.fixture
async def site(redis_url: str, prefix: str) -> AsyncIterator[Site]:
    """Nodes on a real server."""
    async with AsyncExitStack() as stack:
        yield Site(redis_url, prefix, stack)


async def show(request: Request) -> JSONResponse:
    return JSONResponse(request.session.get("cart"))


async def fill(request: Request) -> JSONResponse:
    request.session["cart"] = request.path_params["what"]
    return await show(request)


async def test_request_passes_the_documented_modules(site: Site) -> None:
    """From the cookie of a session that is in the cache to the write, and to the headers of the response."""
    node = await site.node(routes=[Route("/", show), Route("/fill/{what}", fill)])
    async with httpx.AsyncClient(base_url=node.http) as http:
        for what in ("pear", "apple"):  # a write's first one loads its script
            assert (await http.get(f"/fill/{what}")).json() == what
        assert (await http.get("/")).json() == "apple"
        passage = Passage(b"quince")
        with passage.recorded():
            assert (await http.get("/fill/quince")).json() == "quince"
    check("request", passage)


async def test_event_passes_the_documented_modules(site: Site) -> None:
    """From the connection that a broadcast comes in on to the sockets of two members, in a room with
    history.
    """
    rule = RoomRule("board", subscribe=True, history=10, history_ttl=60)
    node = await site.node(rules=[rule])
    room = node.cluster.room("board")
    async with node.client() as one, node.client() as two:
        members = one, two
        for member in members:
            await member.call("subscribe", {"channel": "board"})
        await room.broadcast("first")
        assert [await member.pub() for member in members] == ["first"] * 2
        passage = Passage(b"second")
        with passage.recorded():
            with passage.outside():
                await room.broadcast("second")
            assert [await member.pub() for member in members] == ["second"] * 2
    check("event", passage)
