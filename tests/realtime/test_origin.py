"""Which pages may open a WebSocket: on the built-in endpoint and with ``cluster.accept`` alike, and behind
proxies that pass the host on in one way or another.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from asgi_cluster import Cluster, ClusterMiddleware, CookieConfig, SessionConfig
from tests.realtime.conftest import sign_in
from tests.realtime.site import Node, Site
from tests.realtime.test_connection import UVICORN, cluster_of
from tests.support.machine import LOCAL
from tests.support.nodes import serve

REFUSED, ACCEPTED = 403, 101
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


async def handshake(
    node: Node,
    headers: dict[str, str],
    *,
    path: str = "/realtime/websocket",
    trust: ssl.SSLContext | None = None,
) -> int:
    """The status of a handshake with exactly these headers, as a proxy would send it on."""
    port = int(node.ws.rpartition(":")[2])
    reader, writer = await asyncio.open_connection(LOCAL, port, ssl=trust)
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in (headers | UPGRADE).items())]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    status = int((await asyncio.wait_for(reader.readline(), 5)).split()[1])
    writer.close()
    return status


CASES: list[tuple[str, dict[str, str], int]] = [
    # The browser's own Host, with its port where that is not the scheme's.
    ("https://app.example", {"Host": "app.example"}, ACCEPTED),
    ("https://APP.example", {"Host": "app.EXAMPLE:443"}, ACCEPTED),
    ("http://app.example", {"Host": "app.example:80"}, ACCEPTED),
    ("https://app.example:8443", {"Host": "app.example:8443"}, ACCEPTED),
    ("http://[::1]:8000", {"Host": "[::1]:8000"}, ACCEPTED),
    ("http://[::1]", {"Host": "[::1]"}, ACCEPTED),
    # nginx's "Host $host" drops the port.
    ("https://app.example:8443", {"Host": "app.example"}, ACCEPTED),
    ("http://[::1]:8000", {"Host": "[::1]"}, ACCEPTED),
    # The proxy's own name in Host, or none, and the browser's elsewhere.
    ("https://app.example", {"Host": "10.0.0.7:8000", "X-Forwarded-Host": "app.example"}, ACCEPTED),
    ("https://app.example", {"Host": "", "X-Forwarded-Host": "app.example"}, ACCEPTED),
    ("https://app.example", {"X-Forwarded-Host": "app.example"}, ACCEPTED),
    ("https://app.example", {"Host": "up", "X-Forwarded-Host": "app.example, inner.example"}, ACCEPTED),
    ("https://app.example:8443", {"Host": "up", "X-Forwarded-Host": "app.example:8443"}, ACCEPTED),
    (
        "https://app.example",
        {"Host": "up", "Forwarded": "for=1.2.3.4;host=app.example;proto=https"},
        ACCEPTED,
    ),
    (
        "https://app.example:8443",
        {"Host": "up", "Forwarded": 'for="[::1]";Host="app.example:8443"'},
        ACCEPTED,
    ),
    ("https://app.example", {"Host": "up", "Forwarded": "host=x, for=1.2.3.4; host=app.example"}, ACCEPTED),
    # Another page.
    ("https://evil.example", {"Host": "app.example"}, REFUSED),
    ("https://app.example.evil.example", {"Host": "app.example"}, REFUSED),
    ("https://evil.example", {"Host": "up", "X-Forwarded-Host": "app.example"}, REFUSED),
    ("https://evil.example", {"Host": "up", "Forwarded": "host=app.example"}, REFUSED),
    ("https://evil.example", {"Host": "up", "Forwarded": 'for="host=evil.example"'}, REFUSED),
    ("https://app.example", {"Host": "10.0.0.7:8000"}, REFUSED),
    ("https://app.example", {"Host": ""}, REFUSED),
    ("https://app.example:8443", {"Host": "app.example:443"}, REFUSED),
    ("https://app.example", {"Host": "app.example:8443"}, REFUSED),
    ("null", {"Host": "app.example"}, REFUSED),
    ("null", {"Host": "null"}, REFUSED),
    ("https://", {"Host": ""}, REFUSED),
]


async def test_rule(lone_site: Site) -> None:
    """The page's host is the one that the request names, however the proxies pass it on."""
    node = await lone_site.node(routes=[WebSocketRoute("/own", own)])
    for origin, headers, status in CASES:
        for path in ("/realtime/websocket", "/own"):
            got = await handshake(node, {"Origin": origin, **headers}, path=path)
            assert got == status, (origin, headers, path)
            assert await handshake(node, headers, path=path) == ACCEPTED, (headers, path)


async def own(websocket: WebSocket) -> None:
    async with cluster_of(websocket).accept(websocket) as connection:
        async for _ in connection:
            pass


@pytest.mark.filterwarnings("ignore:.*websockets", "ignore::DeprecationWarning")
@pytest.mark.parametrize("ws", UVICORN)
@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_refusal_in_accept(
    prefix: str, framework: type[Starlette], ws: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A foreign page gets 403; the body does not run, and the server's log holds no error. One warning names
    both values and both cures, once for each origin.
    """
    caplog.set_level(logging.INFO)
    entered: list[str] = []

    async def chat(websocket: WebSocket) -> None:
        async with cluster_of(websocket).accept(websocket) as connection:
            entered.append(connection.id)

    async def free(websocket: WebSocket) -> None:
        async with cluster_of(websocket).accept(websocket, check_origin=False) as connection:
            entered.append(connection.id)

    async def accepted(websocket: WebSocket) -> None:
        await websocket.accept()
        async with cluster_of(websocket).accept(websocket) as connection:
            entered.append(connection.id)

    app = framework()
    for path, endpoint in (("/chat", chat), ("/free", free), ("/accepted", accepted)):
        app.router.routes.append(WebSocketRoute(path, endpoint))
    cluster = Cluster(f"memory://{prefix}", sessions=SessionConfig(cookie=CookieConfig(secure=False)))
    app.state.cluster = cluster
    async with serve(ClusterMiddleware(app, cluster), ws=ws) as served:
        node = Node(cluster, served)
        own = node.http.removeprefix("http://")
        foreign = {"Origin": "https://evil.example", "Host": own}
        for path in ("/chat", "/realtime/websocket", "/chat", "/realtime/websocket"):
            assert await handshake(node, foreign, path=path) == REFUSED
        assert entered == []
        assert await handshake(node, foreign, path="/free") == ACCEPTED
        assert len(entered) == 1
        # Accepted by the app before it asked: closed.
        assert await handshake(node, foreign, path="/accepted") == ACCEPTED
        async with node.raw(path="/accepted", headers={"origin": "https://evil.example"}) as client:
            assert (await client.drained())[0] == 1008
        assert len(entered) == 1
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert "Traceback" not in caplog.text
    warnings = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(warnings) == 1
    for part in ("https://evil.example", own, "proxy_set_header Host", "allowed_origins"):
        assert part in warnings[0]


async def test_refusal_with_a_list(lone_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """With ``allowed_origins`` the list alone decides, and the warning names it."""
    node = await lone_site.node(routes=[WebSocketRoute("/own", own)], allowed_origins=["https://app.example"])
    host = {"Host": "evil.example"}
    for path in ("/realtime/websocket", "/own"):
        assert await handshake(node, {"Origin": "https://evil.example", **host}, path=path) == REFUSED
        assert await handshake(node, {"Origin": "https://app.example", **host}, path=path) == ACCEPTED
    (line,) = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert "https://evil.example" in line
    assert "https://app.example" in line


async def test_log_is_bounded(lone_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A client that invents origins fills the log neither with lines nor with long ones, and hides no origin
    for good: when it ends, the next refusal of another origin is logged, with the number of those that were
    not.
    """
    node = await lone_site.node()
    clock = Clock()
    origins = node.cluster._parts.origins
    origins._clock, origins._counted_at = clock, clock()

    def logged() -> list[str]:
        return [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]

    for number in range(120):
        headers = {"Origin": f"https://{number}.example", "Host": "app.example"}
        assert await handshake(node, headers) == REFUSED
    assert len(logged()) == 20
    page = {"Origin": "https://page.example", "Host": "up"}
    assert await handshake(node, page) == REFUSED
    assert len(logged()) == 20
    clock.now += 3
    for _ in range(3):
        assert await handshake(node, page) == REFUSED
    assert len(logged()) == 21
    assert "https://page.example" in logged()[-1]
    assert "101 refusals before this one were not logged" in logged()[-1]
    clock.now += 3600
    assert await handshake(node, page) == REFUSED
    assert len(logged()) == 21
    assert await handshake(node, {"Origin": "https://" + "x" * 5000}) == REFUSED
    assert len(logged()) == 22
    assert max(len(record.getMessage()) for record in caplog.records) < 1500


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_session_of_a_foreign_page_is_not_read(lone_site: Site) -> None:
    """A page elsewhere cannot use the visitor's cookie on a socket of the app's own."""
    seen: list[Any] = []

    async def who(websocket: WebSocket) -> None:
        async with cluster_of(websocket).accept(websocket) as connection:
            seen.append(connection.user_id)

    node = await lone_site.node(routes=[WebSocketRoute("/who", who)])
    headers = {"Host": node.http.removeprefix("http://"), "Cookie": await sign_in(node, "ada")}
    assert await handshake(node, {**headers, "Origin": "http://evil.example"}, path="/who") == REFUSED
    assert await handshake(node, {**headers, "Origin": node.http}, path="/who") == ACCEPTED
    assert seen == ["ada"]
