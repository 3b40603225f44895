"""A cluster belongs to the event loop that started it, and says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_cluster import Cluster, ClusterMiddleware
from tests.sessions.app import client_for, nodes

pytestmark = pytest.mark.quick

USES: dict[str, Callable[[Cluster], Awaitable[object]]] = {
    "broadcast": lambda cluster: cluster.room("room").broadcast("hello"),
    "logout": lambda cluster: cluster.user("ada").logout(),
    "devices": lambda cluster: cluster.user("ada").sessions(),
    "nodes": lambda cluster: cluster.nodes(),
}


@pytest.mark.parametrize("use", USES)
async def test_use_on_another_loop(cluster_url: str, prefix: str, use: str) -> None:
    """A clear error at once, instead of a reply that never comes; the cluster goes on where it is. On
    memory:// too, where it would work, so that a test finds what production refuses.
    """

    async def elsewhere(cluster: Cluster) -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            async with asyncio.timeout(2):
                await USES[use](cluster)

    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,):
        await asyncio.to_thread(asyncio.run, elsewhere(cluster))
        await USES[use](cluster)


async def test_request_on_another_loop(cluster_url: str, prefix: str) -> None:
    """A request that needs the store is an error of the app's, and not an outage."""

    async def elsewhere(cluster: Cluster) -> None:
        async with client_for(cluster) as client:
            with pytest.raises(RuntimeError, match="another event loop"):
                await client.post("/login?user=ada")

    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,):
        await asyncio.to_thread(asyncio.run, elsewhere(cluster))
        async with client_for(cluster) as client:
            assert (await client.post("/login?user=ada")).status_code == 200


def test_endpoint_that_runs_a_loop_of_its_own(prefix: str) -> None:
    """``asyncio.run`` in a ``def`` endpoint, under the TestClient with its lifespan: refused on memory:// as
    on Redis, and the way that the error names works.
    """
    cluster = Cluster(f"memory://{prefix}")

    def wrong(request: Request) -> JSONResponse:
        try:
            asyncio.run(broadcast())
        except RuntimeError as error:
            return JSONResponse(str(error))
        return JSONResponse("sent")

    def right(request: Request) -> JSONResponse:
        assert cluster.loop is not None
        asyncio.run_coroutine_threadsafe(broadcast(), cluster.loop).result(5)
        return JSONResponse("sent")

    async def broadcast() -> None:
        await cluster.room("room").broadcast("hello")

    routes = [Route("/wrong", wrong), Route("/right", right)]
    app = ClusterMiddleware(Starlette(routes=routes), cluster)
    with TestClient(app, base_url="https://testserver") as client:
        assert "run_coroutine_threadsafe" in client.get("/wrong").json()
        assert client.get("/right").json() == "sent"


def test_memory_without_a_start(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    """It works, on one loop after the other; one line says, once, that Redis would refuse it."""
    caplog.set_level(logging.INFO)
    cluster = Cluster(f"memory://{prefix}")
    for _ in range(2):
        asyncio.run(cluster.room("room").broadcast("hello"))
    told = [record.getMessage() for record in caplog.records if "without a start" in record.getMessage()]
    assert len(told) == 1
    assert "NotStarted" in told[0]


def test_memory_whose_loop_has_gone(prefix: str) -> None:
    """Started on a loop that does not run any more, by a test that never stopped it: there is nothing to
    protect.
    """
    cluster = Cluster(f"memory://{prefix}")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(cluster.__aenter__())
    asyncio.run(cluster.room("room").broadcast("hello"))
    loop.run_until_complete(cluster.__aexit__(None, None, None))
    loop.close()
