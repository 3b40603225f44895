# ruff: noqa: E501 - a table is as wide as it is
"""The table of combinations: ``python -m tests.sessions.combinations`` writes ``docs/combinations.md``.

Every kind of backend, every way in which a socket has its user, and every way in which a session or a user ends. A
new feature that meets them adds a backend, a ``Who`` or a ``How`` here, and its outcomes in ``OUTCOMES``;
``test_combinations.py`` runs each row.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import httpx
import websockets
from starlette.requests import HTTPConnection

from asgi_cluster import (
    Cluster,
    ClusterMiddleware,
    ConnectRequest,
    CookieConfig,
    LogoutReceipt,
    RealtimeConfig,
    SessionConfig,
)
from asgi_cluster.ids import new_token
from tests.sessions.app import make_app
from tests.support.nodes import Node, several
from tests.support.servers import start_valkey
from tests.support.topologies import start_redis_cluster, start_sentinel_set

TABLE = Path(__file__).parents[2] / "docs" / "combinations.md"
TIMEOUT = 20.0
"""Seconds a receipt may wait: so long that waiting for all of it cannot be taken for an answer."""

Who = Literal["session user", "identify", "token", "exclude"]
How = Literal[
    "session, here",
    "session, there",
    "session, from a worker",
    "user, here",
    "user, there",
    "user, from a worker",
    "expiry",
]

WHO: Mapping[Who, str] = {
    "session user": "signed-in session",
    "identify": "anonymous session, user from `identify`",
    "token": "anonymous session, user from a token",
    "exclude": "signed-in session, kept with `exclude=`",
}
HOW: Mapping[How, str] = {
    "session, here": "logout of the session, on the socket's node",
    "session, there": "logout of the session, on another node",
    "session, from a worker": "logout of the session, by a `listen=False` process",
    "user, here": "logout of the user, on the socket's node",
    "user, there": "logout of the user, on another node",
    "user, from a worker": "logout of the user, by a `listen=False` process",
    "expiry": "idle timeout",
}

Servers = Callable[[ExitStack], dict[str, str]]


def _memory(stack: ExitStack) -> dict[str, str]:
    return {"url": "memory://"}


def _redis(stack: ExitStack) -> dict[str, str]:
    return {"url": stack.enter_context(start_valkey()).url}


def _sentinel(stack: ExitStack) -> dict[str, str]:
    return {"url": stack.enter_context(start_sentinel_set()).url}


def _cluster(stack: ExitStack) -> dict[str, str]:
    return {"url": stack.enter_context(start_redis_cluster(replicas=0)).url}


def _rooms_url(stack: ExitStack) -> dict[str, str]:
    return {**_redis(stack), "rooms_url": stack.enter_context(start_valkey()).url}


BACKENDS: dict[str, Servers] = {
    "memory": _memory,
    "Redis": _redis,
    "Sentinel": _sentinel,
    "Cluster": _cluster,
    "rooms_url": _rooms_url,
}
"""How to get the URLs of each; what it starts is stopped with the stack."""


@dataclass(frozen=True)
class Outcome:
    """What happens to the socket, and what the receipt says. ``closes=None``: it stays open."""

    closes: int | None
    sessions: int | None = None
    sockets_closed: int | None = None

    def cells(self) -> list[str]:
        """As they stand in the table."""
        closes = "stays open" if self.closes is None else str(self.closes)
        if self.sessions is None:
            return [closes, "none"]
        return [
            closes,
            f"{self.sessions} sessions, {self.sockets_closed} sockets, all nodes acknowledged, complete",
        ]


def _outcomes() -> dict[tuple[Who, How], Outcome]:
    found: dict[tuple[Who, How], Outcome] = {}
    for who, how in product(WHO, HOW):
        if how == "expiry":
            found[who, how] = Outcome(4502)
        elif how.startswith("session"):
            if who != "exclude":  # which is an argument of the user's logout
                found[who, how] = Outcome(4501, sessions=1, sockets_closed=1)
        elif who == "exclude":
            # The user's other session ends, with its socket.
            found[who, how] = Outcome(None, sessions=1, sockets_closed=1)
        else:
            # An anonymous session is nobody's: it goes on, without the socket that acted as the user.
            found[who, how] = Outcome(4501, sessions=int(who == "session user"), sockets_closed=1)
    return found


OUTCOMES = _outcomes()
"""Every row: the same on each backend."""


def identify(scope: Mapping[str, Any]) -> str | None:
    return HTTPConnection(dict(scope)).headers.get("x-user")


def token_is_user(request: ConnectRequest) -> str | None:
    return request.token or None


class Stage:
    """Two nodes and a worker of one cluster."""

    def __init__(self, clusters: list[Cluster], nodes: list[Node], worker: Cluster) -> None:
        self.clusters = clusters
        self.nodes = nodes
        self.worker = worker

    @asynccontextmanager
    async def socket(self, who: Who, user: str) -> AsyncIterator[tuple[websockets.ClientConnection, str]]:
        """A client of the endpoint on the first node that acts as ``user``, and its session's handle."""
        node = self.nodes[0]
        async with httpx.AsyncClient(base_url=node.url) as browser:
            signed_in = who in ("session user", "exclude")
            path = f"/login?user={user}" if signed_in else "/put"
            handle: str = (await browser.post(path, json={"cart": 1})).json()["handle"] or (
                await browser.get("/show")
            ).json()["handle"]
            headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in browser.cookies.items())}
        if who == "identify":
            headers["X-User"] = user
        address = f"{node.ws_url}/realtime/websocket"
        async with websockets.connect(address, additional_headers=headers) as connection:
            await connection.send(json.dumps({"id": 1, "connect": {"token": user} if who == "token" else {}}))
            assert '"connect"' in str(await connection.recv())
            yield connection, handle

    async def end(self, who: Who, how: How, user: str, handle: str) -> LogoutReceipt | None:
        """Do it; ``None`` when time does it."""
        if how == "expiry":
            return None
        what, where = how.split(", ")
        origin = {"here": self.clusters[0], "there": self.clusters[1], "from a worker": self.worker}[where]
        if what == "session":
            return await origin.session(handle).logout(timeout=TIMEOUT)
        return await origin.user(user).logout(exclude=handle if who == "exclude" else None, timeout=TIMEOUT)


@asynccontextmanager
async def staged(servers: Mapping[str, str], *, expiring: bool) -> AsyncIterator[Stage]:
    """Real uvicorn servers, with a prefix of their own; ``expiring``: an idle timeout of a second."""
    sessions = SessionConfig(cookie=CookieConfig(secure=False), idle_timeout=1.0 if expiring else 7200.0)
    prefix = f"t{new_token()}"
    if servers["url"] == "memory://":  # where the name is what keeps clusters apart
        servers = {"url": f"memory://{prefix}"}
    options: dict[str, Any] = {
        **servers,
        "prefix": prefix,
        "sessions": sessions,
        "identify": identify,
        "realtime": RealtimeConfig(connect=token_is_user),
    }
    clusters = [Cluster(node_label=f"n{number}", **options) for number in range(2)]
    apps = [ClusterMiddleware(make_app(), cluster) for cluster in clusters]
    async with AsyncExitStack() as stack:
        nodes = await stack.enter_async_context(several(2, lambda number: apps[number]))
        worker = await stack.enter_async_context(Cluster(listen=False, **options))
        yield Stage(clusters, nodes, worker)


async def play(stage: Stage, who: Who, how: How) -> float | None:
    """One row: raises ``AssertionError`` unless it is as ``OUTCOMES`` says. ``stage`` is an expiring
    one for ``expiry``.

    Seconds from the call to its receipt; ``None`` when there is none.
    """
    expected = OUTCOMES[who, how]
    user = f"ada-{new_token()}"
    async with AsyncExitStack() as stack:
        socket, handle = await stack.enter_async_context(stage.socket(who, user))
        bystander, _ = await stack.enter_async_context(stage.socket(who, f"bob-{new_token()}"))
        other = None
        if who == "exclude" and how != "expiry":
            other, _ = await stack.enter_async_context(stage.socket(who, user))
        receipt = await stage.end(who, how, user, handle)
        if receipt is not None:
            assert (receipt.sessions, receipt.sockets_closed) == (expected.sessions, expected.sockets_closed)
            assert (receipt.complete, receipt.nodes_missing) == (True, ())
            assert set(receipt.nodes_acked) == {cluster.node for cluster in stage.clusters}
            assert receipt.elapsed < TIMEOUT / 2
            await answers(bystander)
        if other is not None:
            assert await closed(other) == 4501
        if expected.closes is None:
            await answers(socket)
        else:
            assert await closed(socket) == expected.closes
        return None if receipt is None else receipt.elapsed


async def answers(socket: websockets.ClientConnection) -> None:
    """It is open, and served."""
    await socket.send('{"id":9,"rpc":{"method":"x"}}')
    async with asyncio.timeout(10):
        assert '"id":9' in str(await socket.recv())


async def closed(socket: websockets.ClientConnection) -> int | None:
    async with asyncio.timeout(15):
        await socket.wait_closed()
    return socket.close_code


def row(who: Who, how: How, times: list[str]) -> str:
    cells = [WHO[who], HOW[how], *OUTCOMES[who, how].cells(), *times]
    return f"| {' | '.join(cells)} |\n"


def described() -> list[list[str]]:
    """The rows that the suite has, without what was measured."""
    return [[WHO[who], HOW[how], *OUTCOMES[who, how].cells()] for who, how in OUTCOMES]


async def main() -> None:
    """Play all rows on all backends, and write the table."""
    text = PREFACE
    head = ["socket", "what ends it", "closes with", "receipt", *BACKENDS]
    text += f"| {' | '.join(head)} |\n|{' --- |' * len(head)}\n"
    with ExitStack() as stack:
        servers = {name: start(stack) for name, start in BACKENDS.items()}
        measured: dict[tuple[Who, How], list[str]] = {each: [] for each in OUTCOMES}
        for name in BACKENDS:
            for expiring in (False, True):
                async with staged(servers[name], expiring=expiring) as stage:
                    for (who, how), times in measured.items():
                        if (how == "expiry") is expiring:
                            elapsed = [await play(stage, who, how) for _ in range(1 if expiring else 5)]
                            known = sorted(each for each in elapsed if each is not None)
                            times.append(f"{1000 * known[0]:.0f} ms" if known else "met")
        for (who, how), times in measured.items():
            text += row(who, how, times)
            print(row(who, how, times), end="", flush=True)
    TABLE.write_text(text)


PREFACE = f"""# Combinations, and what a logout does

Written by `uv run python -m tests.sessions.combinations`, against real servers; `tests/sessions/test_combinations.py` runs each row on each
backend. There are two nodes and a process with `listen=False`. The socket is a client of the built-in endpoint on the first node. A second socket of
the same kind belongs to another user and stays open in every row, except those of the timeout, which ends its session as well.

- *closes with*: the close code of the socket. 4501 is a logout, 4502 an expired session.
- *receipt*: sessions that were ended, sockets that were closed, nodes that acknowledged. The `listen=False` process is no node and is not in
  it. A user's logout ends no anonymous session, and closes the sockets that acted as the user. With `exclude=` it ends the user's other session.
- *memory* to *rooms_url* (rooms on a server of their own): the row is met there, with the time from the call to the receipt, the best of five
  on a busy machine. The tests demand that it is less than half of the timeout ({TIMEOUT:g} s): that no node was waited for that could not answer.

"""


if __name__ == "__main__":
    asyncio.run(main())
    sys.exit(0)
