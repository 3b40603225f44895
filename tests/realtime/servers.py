# ruff: noqa: E501 - a table is as wide as it is
"""The table of servers: ``python -m tests.realtime.servers`` writes ``docs/servers.md``.

Each server runs as the process that its users start, with Redis. A row is what was seen of it. The tests see the
same again, and compare it with the row in the document.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from asgi_cluster import CacheConfig, Cluster, SessionConfig
from tests.realtime.site import Node as Site
from tests.realtime.site import Raw
from tests.support.asgi import running
from tests.support.machine import LOCAL, ROOT, self_signed
from tests.support.nodes import Node
from tests.support.servers import start_valkey
from tests.support.waiting import eventually

APP = "tests.realtime.served:app"
DOCUMENT = ROOT / "docs" / "servers.md"
CROWD = 20
ROWS = {
    "uvicorn, websockets-sansio": "uvicorn, websockets-sansio",
    "uvicorn, TLS": "uvicorn, websockets-sansio",
    **{
        name: name
        for name in (
            "uvicorn, websockets",
            "uvicorn, wsproto",
            "uvicorn, lifespan off",
            "uvicorn, 2 workers",
            "gunicorn, uvicorn worker, 2 workers",
            "gunicorn, own ASGI worker",
            "hypercorn",
            "hypercorn, 0 workers",
            "granian",
            "granian, without lifespan",
            "Daphne",
        )
    },
}
"""The rows, and the server of each."""
AT_ONCE = 4
WAITING = "waits for its clients"
LINGERS = "hypercorn" if sys.version_info >= (3, 12) else None
"""Does not end while a client is connected (hypercorn issue 308). When that is mended, this and the sentence in
``NOTES`` go.
"""


@dataclass
class Client:
    """What a browser would be."""

    node: Node
    trust: ssl.SSLContext | None = None
    cookie: str = ""

    async def get(self, path: str) -> httpx.Response:
        headers = {"cookie": self.cookie} if self.cookie else {}
        verify = self.trust or True
        async with httpx.AsyncClient(
            base_url=self.node.url, timeout=60, headers=headers, verify=verify
        ) as http:
            return await http.get(path)

    async def sign_in(self, user: str) -> None:
        response = await self.get(f"/login?user={user}")
        assert response.status_code == 200, response.text
        self.cookie = str(response.headers["set-cookie"].partition(";")[0])

    @asynccontextmanager
    async def socket(self, path: str) -> AsyncIterator[Raw]:
        options = {"ssl": self.trust} if self.trust else {}
        async with Site(Cluster("memory://elsewhere"), self.node).raw(
            self.cookie, path=path, **options
        ) as raw:
            yield raw


@dataclass(frozen=True)
class Row:
    """What was seen."""

    name: str
    start: str
    works: str
    writes: str
    close: str
    stop: str

    def __str__(self) -> str:
        return f"| {' | '.join((self.name, self.start, self.works, self.writes, self.close, self.stop))} |"


async def examine(name: str, url: str) -> Row:
    """Run a server and use it: session, room, live logout, and SIGTERM with ``drain=1.0`` and twenty sockets.

    Raises:
        AssertionError: something does not work at all.
    """
    prefix = f"t{secrets.token_hex(6)}"
    env = {"ASGI_CLUSTER_URL": url, "PREFIX": prefix, "DRAIN": "1.0"}
    async with AsyncExitStack() as stack:
        args: tuple[str, ...] = ()
        trust: ssl.SSLContext | None = None
        if "TLS" in name:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="asgi-cluster-"))
            certificate, key = self_signed(Path(directory), f"IP:{LOCAL}")
            args = ("--ssl-keyfile", key, "--ssl-certfile", certificate)
            trust = ssl.create_default_context(cafile=certificate)
        # Several servers run at once, on few cores: this node is patient.
        patient = SessionConfig(cache=CacheConfig(lease=15.0))
        observer = Cluster(url, prefix=prefix, sessions=patient, deadline=15.0)
        await stack.enter_async_context(observer)
        node = await stack.enter_async_context(running(ROWS[name], APP, env=env, args=args))
        client = Client(node, trust)
        await client.sign_in("ada")
        assert (await client.get("/visit")).json() == 1
        assert (await client.get("/visit")).json() == 2
        assert len(await observer.user("ada").sessions()) == 1
        close, writes, works = await use(client, observer)
        stop = await end(client, observer, lingers=name == LINGERS)
        # Tracebacks of ours: hypercorn has its own when it cancels connections.
        for bad in (f"{ROOT}/asgi_cluster/", "never retrieved", "was destroyed", "never awaited"):
            assert bad not in node.log(), node.log()[-4000:]
        lazily = "started by the first request" in node.log()
    return Row(name, "first request" if lazily else "lifespan", works, writes, close, stop)


async def examine_all(names: Iterable[str], url: str) -> dict[str, Row | BaseException]:
    """The rows of these servers, or what went wrong; a few at a time, since most of it is waiting."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> Row:
        async with places:
            row = await examine(name, url)
            print(row, file=sys.stderr)
            return row

    names = list(names)
    return dict(zip(names, await asyncio.gather(*map(one, names), return_exceptions=True), strict=True))


async def use(client: Client, observer: Cluster) -> tuple[str, str, str]:
    """Three kinds of sockets: a message from another node, and a logout."""
    async with (
        client.socket("/realtime/websocket") as protocol,
        client.socket("/room") as room,
        client.socket("/plain") as plain,
    ):
        await protocol.call("connect", {})
        await protocol.call("subscribe", {"channel": "open"})
        assert await room.ws.recv() == "ready"
        await plain.ws.send("hallo")
        assert await plain.ws.recv() == "echo hallo"
        await observer.room("open").broadcast("news")
        assert await room.ws.recv() == "news"
        assert await protocol.pub() == "news"
        writes = await eventually(lambda: ways(client), timeout=20)
        receipt: dict[str, Any] = (await client.get("/logout")).json()
        ends = {await socket.drained() for socket in (protocol, room, plain)}
    assert receipt == {"closed": 3, "complete": True}
    ((code, reason),) = ends
    assert (await client.get("/me")).json()["user"] is None
    return f"{code}, {'with' if reason else 'no'} reason", writes, "yes"


async def ways(client: Client) -> str:
    """How messages leave; of one worker, and the next one is asked when it has no sockets."""
    stats = (await client.get("/stats")).json()
    found = [*stats["fallback"], *(["directly"] if stats["direct"] else [])]
    return ", ".join(f"ASGI send: {way}" if way != "directly" else way for way in sorted(found))


async def end(client: Client, observer: Cluster, *, lingers: bool) -> str:
    """SIGTERM with twenty sockets."""
    node = client.node
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        crowd = [await stack.enter_async_context(client.socket("/room")) for _ in range(CROWD)]
        for socket in crowd:
            assert await socket.ws.recv() == "ready"

        async def code_and_time(socket: Raw) -> tuple[int, float]:
            code, _ = await socket.drained(timeout=60)
            return code, loop.time()

        if lingers:
            node.signal(signal.SIGTERM)
            with pytest.raises(TimeoutError):
                await crowd[0].drained(timeout=5)
            how = WAITING
        else:
            async with asyncio.TaskGroup() as tasks:
                watching = [tasks.create_task(code_and_time(socket)) for socket in crowd]
                node.signal(signal.SIGTERM)
            codes = sorted({task.result()[0] for task in watching})
            times = [task.result()[1] for task in watching]
            drained = codes == [3001] and max(times) - min(times) > 0.3
            how = f"{'one after another' if drained else 'at once'}, {listed(codes)}"
    assert node.process is not None
    await asyncio.to_thread(node.process.wait, 60)
    gone = len(await observer.nodes()) == 1
    if not gone:
        await eventually(lambda: alone(observer), timeout=20, interval=0.2)
    return f"{how}; signs off{'' if gone else ' after 4 s'}"


def listed(codes: Iterable[int]) -> str:
    return " and ".join(map(str, codes))


async def alone(observer: Cluster) -> bool:
    return len(await observer.nodes()) == 1


HEAD = """\
# Servers

Written by `uv run python -m tests.realtime.servers`; the tests do the same and compare. Each server runs as a process of its own, as its
users start it, with Redis.
"""

NOTES = """\
- *Starts*: with ASGI lifespan, or with the first request or WebSocket where the server has none. A start that fails ends the server, or
  answers 503 with `Retry-After` and is tried again. gunicorn's own ASGI worker continues without the app's own startup then, unless
  `--asgi-lifespan on` is given.
- *Session, rooms, live logout*: a session that is read and written, a room with a message from another node, and a logout that closes a
  client of the built-in endpoint, a socket of `cluster.accept` and a socket that the app itself accepted. The receipt counts all three.
- *Messages*: written as ready frames to the server's transport, or sent through ASGI `send`, and why; one INFO line says the same. Both
  keep the order, and the bound in bytes. On Daphne an app may close with 1000 and 3000 to 4999 only, so other codes become 1000.
- *SIGTERM*: with `RealtimeConfig(drain=1.0)` and 20 open sockets. One after another with 3001 is a drain. Other servers close all
  sockets at the same moment, in their own way, and an INFO or WARNING line at the start says so: call `await cluster.drain(seconds)` before you
  stop it. On Python 3.12 and newer, hypercorn with workers does not stop while a client is connected (its issue 308): drain first, or use
  `--workers 0`. A node that *signs off* removes itself from the registry. The others remove one that does not after
  4 s; until then logouts wait up to a second for it.

`drain` is 5 s by default. At most 20 sockets are closed per second as long as that time is enough: one socket takes 0.05 s, 1000 sockets take
the 5 s, and without sockets the server stops at once. `drain=None` turns it off. Ctrl-C and `--reload` do not wait, and a second SIGTERM ends
the wait. Give the server more time than that before it is killed (`terminationGracePeriodSeconds`, `--graceful-timeout`).
"""

COLUMNS = "| server | starts with | session, rooms, live logout | messages | close | SIGTERM |\n|---|---|---|---|---|---|\n"


def document(lines: Iterable[str]) -> str:
    """The whole document, with these lines as its table."""
    return f"{HEAD}\n{COLUMNS}" + "".join(f"{line}\n" for line in lines) + f"\n{NOTES}"


async def main() -> None:
    with start_valkey() as server:
        rows = await examine_all(ROWS, server.url)
    for row in rows.values():
        if isinstance(row, BaseException):
            raise row
    DOCUMENT.write_text(document(map(str, rows.values())))


if __name__ == "__main__":
    asyncio.run(main())
