"""Each ASGI server as its users start it: session, room, live logout, drain."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace

import psutil
import pytest

from asgi_cluster import Cluster
from loadtest.ports import free_port
from tests.realtime.servers import APP, DOCUMENT, LINGERS, ROWS, WAITING, Client, Row, document, examine_all
from tests.support.asgi import running
from tests.support.machine import LOCAL
from tests.support.servers import Server, start_valkey
from tests.support.waiting import eventually


async def test_every_close_code_reaches_the_client_on_daphne(prefix: str) -> None:
    """Daphne takes plain integers only, and of those only what an app may send: others become 1000."""
    async with running("Daphne", APP, env={"PREFIX": prefix}) as node:
        browser = Client(node)
        async with browser.socket("/realtime/websocket") as client, browser.socket("/away") as away:
            await client.ws.send("nonsense")
            assert (await client.drained())[0] == 3501
            assert (await away.drained())[0] == 1000
        assert "Traceback" not in node.log()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("server", ["Daphne", "granian, without lifespan"])
async def test_ctrl_c_without_lifespan(server: str, redis_url: str, prefix: str) -> None:
    """The node that the first request started signs off then too, and nothing hangs."""
    env = {"ASGI_CLUSTER_URL": redis_url, "PREFIX": prefix}
    async with Cluster(redis_url, prefix=prefix) as observer, running(server, APP, env=env) as node:
        assert len(await observer.nodes()) == 1
        client = Client(node)
        await client.sign_in("ada")
        assert len(await observer.nodes()) == 2
        node.signal(signal.SIGINT)
        assert node.process is not None
        await asyncio.to_thread(node.process.wait, 60)
        assert len(await observer.nodes()) == 1
        for bad in ("Traceback", "never retrieved", "was destroyed", "never awaited"):
            assert bad not in node.log(), node.log()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("server", ["granian", "gunicorn, uvicorn worker", "uvicorn, 2 workers"])
async def test_ctrl_c_in_a_terminal(server: str, redis_url: str, prefix: str) -> None:
    """It is for the server and its workers at once: the nodes sign off, and no error is logged.

    granian's worker stops its event loop for it, and gets a SIGTERM from its parent meanwhile.
    """
    env = {"ASGI_CLUSTER_URL": redis_url, "PREFIX": prefix}
    async with Cluster(redis_url, prefix=prefix) as observer, running(server, APP, env=env) as node:
        client = Client(node)
        async with client.socket("/realtime/websocket"), client.socket("/realtime/websocket"):
            main = psutil.Process(node.pid)
            for process in (*main.children(), main):
                process.send_signal(signal.SIGINT)
            assert node.process is not None
            await asyncio.to_thread(node.process.wait, 60)
        assert len(await observer.nodes()) == 1
        for bad in ("Traceback", "never retrieved", "was destroyed", "never awaited"):
            assert bad not in node.log(), node.log()


async def test_server_that_serves_although_its_start_has_failed(prefix: str) -> None:
    """gunicorn's own worker does. Requests are 503 until Redis is there, and start the cluster then."""
    port = free_port()
    env = {"ASGI_CLUSTER_URL": f"redis://{LOCAL}:{port}/0", "PREFIX": prefix}
    async with running("gunicorn, own ASGI worker", APP, env=env) as node:
        client = Client(node)
        refused = await client.get("/visit")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        with start_valkey(port=port) as server:

            async def visits() -> bool:
                return (await client.get("/visit")).status_code == 200

            await eventually(visits, timeout=20, interval=0.2)
            node.signal(signal.SIGTERM)
            assert node.process is not None
            await asyncio.to_thread(node.process.wait, 20)
            with server.client() as redis:
                assert redis.hlen(f"{prefix}:{{nodes}}:all") == 0
        assert "Traceback" not in node.log(), node.log()


WORKERS = {
    "gunicorn, uvicorn worker": False,
    "gunicorn, uvicorn worker, 2 workers": True,
    "gunicorn, 2 workers, preloaded": True,
    "uvicorn, 2 workers": True,
    "uvicorn, websockets-sansio": False,
}


@pytest.mark.timeout(180)
async def test_several_workers_without_a_url(prefix: str) -> None:
    """Their sessions are not shared, which is said with what to do; a lone worker is not warned."""

    async def one(server: str, warns: bool) -> None:
        async with running(server, APP, env={"PREFIX": prefix, "ASGI_CLUSTER_URL": ""}) as node:
            assert (await Client(node).get("/me")).status_code == 200
            if warns:
                await eventually(lambda: "Set ASGI_CLUSTER_URL" in node.log(), timeout=60, message=server)
            else:
                assert "Set ASGI_CLUSTER_URL" not in node.log(), server

    async with asyncio.TaskGroup() as tasks:
        for server, warns in WORKERS.items():
            tasks.create_task(one(server, warns))


@pytest.fixture(scope="module")
async def rows(request: pytest.FixtureRequest, valkey: Server) -> dict[str, Row | BaseException]:
    """Of the servers whose tests were asked for: a few run at a time."""
    wanted = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_server.__name__
    ]
    return await examine_all(wanted, valkey.url)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ROWS)
async def test_server(name: str, rows: dict[str, Row | BaseException]) -> None:
    """Session, room, live logout and drain work as the document says, which ``python -m
    tests.realtime.servers`` writes anew.
    """
    row = rows[name]
    if isinstance(row, BaseException):
        raise row
    if name == LINGERS:
        row = replace(row, stop=row.stop.replace(WAITING, "at once, 1011"))  # as on Python 3.11
    assert str(row) in DOCUMENT.read_text().splitlines()


def test_document_is_the_suites() -> None:
    """It has a row for each server, in order, and its text is that of the suite."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == list(ROWS)
    assert DOCUMENT.read_text() == document(lines)
