"""Servers without ASGI lifespan: the first call starts the cluster."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_cluster import Cluster, ClusterMiddleware, CookieConfig, NotStarted, SessionConfig
from loadtest.ports import free_port
from tests.support.machine import LOCAL
from tests.support.nodes import serve
from tests.support.servers import start_valkey
from tests.support.waiting import eventually


async def visit(request: Request) -> JSONResponse:
    request.session["visits"] = request.session.get("visits", 0) + 1
    return JSONResponse(request.session["visits"])


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(await websocket.receive_text())
    await websocket.close()


def make(url: str, prefix: str) -> tuple[Cluster, ClusterMiddleware]:
    cluster = Cluster(url, prefix=prefix, sessions=SessionConfig(cookie=CookieConfig(secure=False)))
    routes = [Route("/visit", visit), WebSocketRoute("/echo", echo)]
    return cluster, ClusterMiddleware(Starlette(routes=routes), cluster)


async def test_first_requests_share_one_start(
    redis_url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Twenty at once, and one node; a session works, and the context of no request is kept for ever."""
    caplog.set_level(logging.INFO)
    cluster, app = make(redis_url, prefix)
    async with serve(app, lifespan="off") as node, httpx.AsyncClient(base_url=node.url) as http:
        assert not cluster.started
        answers = await asyncio.gather(*(http.get("/visit") for _ in range(20)))
        assert [answer.text for answer in answers] == ["1"] * 20
        await http.get("/visit")
        assert int((await http.get("/visit")).text) > 1
        assert len(await cluster.nodes()) == 1
        assert [record.getMessage() for record in caplog.records].count(f"node {cluster.node} started") == 1
        await cluster.__aexit__()


async def test_start_fails_and_is_tried_again(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without Redis: 503 with Retry-After, and a close that asks the client to come back. After a pause, and
    not before, it is tried again.
    """
    port = free_port()
    cluster, app = make(f"redis://{LOCAL}:{port}", prefix)
    async with serve(app, lifespan="off") as node, httpx.AsyncClient(base_url=node.url, timeout=20) as http:
        refused = await asyncio.gather(*(http.get("/visit") for _ in range(5)))
        assert {answer.status_code for answer in refused} == {503}
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        again = await http.get("/visit")
        assert again.status_code == 503
        assert sum("next try" in record.getMessage() for record in caplog.records) == 1
        assert await close_code(node.ws_url + "/echo") == 4100
        with start_valkey(port=port):
            answer = await eventually(lambda: succeeded(http), timeout=15, interval=0.2)
            assert answer is not None
            assert answer.text == "1"
            assert await close_code(node.ws_url + "/echo") == 1000
            await cluster.__aexit__()
    assert "Traceback" not in caplog.text


async def succeeded(http: httpx.AsyncClient) -> httpx.Response | None:
    answer = await http.get("/visit")
    return answer if answer.status_code == 200 else None


async def close_code(url: str) -> int | None:
    import websockets

    async with websockets.connect(url, proxy=None) as socket:
        try:
            await socket.send("hallo")
            while True:
                await socket.recv()
        except websockets.ConnectionClosed:
            return socket.close_code


@pytest.mark.parametrize(
    ("lost", "last"), [(False, "node {} stopped"), (True, "node {} could not sign off: ")]
)
def test_loop_that_ends(prefix: str, caplog: pytest.LogCaptureFixture, lost: bool, last: str) -> None:
    """A server that only ends its loop: the node signs off, and the log says so, or why it could not."""
    caplog.set_level(logging.INFO)
    with start_valkey() as server:
        cluster, app = make(server.url, prefix)

        async def serve_one_request() -> None:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                assert (await http.get("/visit")).text == "1"
            if lost:
                server.kill()

        asyncio.run(serve_one_request())
    assert caplog.records[-1].getMessage().startswith(last.format(cluster.node))


@pytest.mark.parametrize("servers", ["sentinel_set", "redis_cluster"])
def test_loop_that_ends_with_other_topologies(
    request: pytest.FixtureRequest, prefix: str, caplog: pytest.LogCaptureFixture, servers: str
) -> None:
    """The node signs off there, too: it has to find the servers again, in a task that was cancelled."""
    caplog.set_level(logging.INFO)
    url = request.getfixturevalue(servers).url
    cluster, app = make(url, prefix)

    async def serve_one_request() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            assert (await http.get("/visit")).text == "1"

    asyncio.run(serve_one_request())
    assert f"node {cluster.node} stopped" in caplog.messages

    async def registered() -> list[str]:
        async with Cluster(url, prefix=prefix, listen=False) as publisher:
            return [found.id for found in await publisher.nodes()]

    assert asyncio.run(registered()) == []


async def test_error_of_another_kind(
    redis_url: str, prefix: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged with its traceback once per try, and answered with 503 as well."""
    cluster, app = make(redis_url, prefix)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(cluster._parts.backend, "open", fail)
    async with serve(app, lifespan="off") as node, httpx.AsyncClient(base_url=node.url) as http:
        assert [(await http.get("/visit")).status_code for _ in range(3)] == [503] * 3
    assert caplog.text.count("ZeroDivisionError: inside") == 1


async def test_cluster_that_was_started_is_not_started_lazily(redis_url: str, prefix: str) -> None:
    """Whoever starts and stops it decides: a call after the stop does not bring the node back."""
    cluster, app = make(redis_url, prefix)
    async with cluster:
        node = cluster.node
    async with serve(app, lifespan="off") as served, httpx.AsyncClient(base_url=served.url) as http:
        assert (await http.get("/visit")).status_code == 500
    assert cluster.node == node
    with pytest.raises(NotStarted):
        await cluster.nodes()


async def test_outside_of_a_request_nothing_starts_it(redis_url: str, prefix: str) -> None:
    """``NotStarted``, with what to do."""
    cluster, _ = make(redis_url, prefix)
    with pytest.raises(NotStarted, match="lifespan"):
        await cluster.room("r").broadcast("x")
