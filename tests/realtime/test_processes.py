"""Each ASGI server as its users start it: session, room, live logout, drain."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import httpx
import pytest

from asgi_cluster import Cluster
from tests.realtime.site import Node as Site
from tests.support.asgi import running
from tests.support.nodes import Node
from tests.support.waiting import eventually

APP = "tests.realtime.served:app"


def client_of(node: Node) -> Site:
    """The client side of ``site.Node``, for a process."""
    return Site(Cluster("memory://not-this-one"), node)


async def get(node: Node, path: str, cookie: str = "") -> httpx.Response:
    headers = {"cookie": cookie} if cookie else {}
    async with httpx.AsyncClient(base_url=node.url, timeout=15, headers=headers) as http:
        return await http.get(path)


async def signed_in(node: Node, user: str = "ada") -> str:
    """The cookie of a new session of ``user``."""
    response = await get(node, f"/login?user={user}")
    assert response.status_code == 200, response.text
    return str(response.headers["set-cookie"].partition(";")[0])


async def test_logout_closes_sockets_on_daphne(prefix: str) -> None:
    """All three kinds of sockets are closed with 4501, and the receipt says so."""
    async with running("Daphne", APP, env={"PREFIX": prefix}) as node:
        cookie = await signed_in(node)
        site = client_of(node)
        async with (
            site.client(cookie) as client,
            site.raw(cookie, path="/room") as room,
            site.raw(cookie, path="/plain") as plain,
        ):
            assert await room.ws.recv() == "ready"
            await plain.ws.send("hallo")
            assert await plain.ws.recv() == "echo hallo"
            answer: dict[str, Any] = (await get(node, "/logout", cookie)).json()
            for socket in (client, room, plain):
                assert (await socket.drained())[0] == 4501
            assert answer == {"closed": 3, "complete": True}
        assert "Traceback" not in node.log()


async def test_every_close_code_reaches_the_client_on_daphne(prefix: str) -> None:
    """Daphne takes plain integers only, and of those only what an app may send: others become 1000."""
    async with running("Daphne", APP, env={"PREFIX": prefix}) as node:
        site = client_of(node)
        async with site.client() as client, site.raw(path="/away") as away:
            await client.ws.send("nonsense")
            assert (await client.drained())[0] == 3501
            assert (await away.drained())[0] == 1000
        assert "Traceback" not in node.log()


async def alone(observer: Cluster) -> bool:
    return len(await observer.nodes()) == 1


WITHOUT_LIFESPAN = [
    "Daphne",
    "uvicorn, lifespan off",
    "gunicorn, own ASGI worker, lifespan off",
    "granian, without lifespan",
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("server", WITHOUT_LIFESPAN)
async def test_server_without_lifespan(
    server: str, number: signal.Signals, redis_url: str, prefix: str
) -> None:
    """The first request starts the cluster; the end of the process takes the node off the registry, with no
    traceback and without hanging.
    """
    env = {"ASGI_CLUSTER_URL": redis_url, "PREFIX": prefix}
    async with Cluster(redis_url, prefix=prefix) as observer, running(server, APP, env=env) as node:
        assert len(await observer.nodes()) == 1
        cookie = await signed_in(node)
        assert len(await observer.nodes()) == 2
        async with client_of(node).raw(cookie, path="/room") as room:
            assert await room.ws.recv() == "ready"
            assert (await get(node, "/logout", cookie)).json() == {"closed": 1, "complete": True}
            assert (await room.drained())[0] == 4501
        node.signal(number)
        assert node.process is not None
        await asyncio.to_thread(node.process.wait, 15)
        if (server, number) != ("uvicorn, lifespan off", signal.SIGTERM):
            assert len(await observer.nodes()) == 1
        else:
            # uvicorn ends with the signal's own effect, and nothing runs after that: the others notice.
            await eventually(lambda: alone(observer), timeout=20, interval=0.2)
        for bad in ("Traceback", "never retrieved", "was destroyed", "never awaited"):
            assert bad not in node.log(), node.log()


@pytest.mark.parametrize(
    ("server", "warns"),
    [
        ("gunicorn, uvicorn worker", False),
        ("gunicorn, uvicorn worker, 2 workers", True),
        ("gunicorn, 2 workers, preloaded", True),
        ("uvicorn, 2 workers", True),
        ("uvicorn, websockets-sansio", False),
    ],
)
async def test_several_workers_without_a_url(server: str, warns: bool, prefix: str) -> None:
    """Their sessions are not shared, which is said with what to do; a lone worker is not warned."""
    env = {"PREFIX": prefix, "ASGI_CLUSTER_URL": ""}
    async with running(server, APP, env=env) as node:
        await eventually(lambda: get(node, "/me"), timeout=10)
        if warns:
            await eventually(lambda: "Set ASGI_CLUSTER_URL" in node.log(), timeout=10)
        else:
            assert "Set ASGI_CLUSTER_URL" not in node.log()
