"""After a gap every open socket's session is asked about, in batches, and at a bounded cost."""

from __future__ import annotations

import asyncio
from time import process_time
from typing import Any

import pytest

from asgi_cluster.codes import CloseCode
from asgi_cluster.sockets.closes import Closes
from asgi_cluster.sockets.socket import Socket
from tests.sessions.app import nodes
from tests.sessions.test_users import login, many
from tests.support.servers import start_valkey
from tests.support.waiting import eventually

SOCKETS = 10_000


@pytest.mark.faults
async def test_sessions_of_ten_thousand_sockets_are_revalidated_after_a_gap(prefix: str) -> None:
    """At most 2 s of CPU, the close of what is over included; the living stay."""
    with start_valkey() as server:
        async with nodes(server.url, 1, prefix=prefix) as (cluster,), asyncio.TaskGroup() as tasks:
            pairs = [login(cluster, f"user-{number}") for number in range(SOCKETS)]
            await many([creation for _, creation in pairs])
            closed: list[int] = []

            async def send(message: Any) -> None:
                closed.append(message["code"])

            for handle, _ in pairs:
                socket = Socket(
                    {}, send, tasks=tasks, crosses_loops=False, close_timeout=1.0, closes=Closes()
                )
                socket.handle = handle
                cluster._parts.hub.register(socket)
                socket.opened()
            raw = server.client()
            over = [handle for handle, _ in pairs[::100]]
            for handle in over:  # by hand: nobody publishes, so only asking finds it
                raw.delete(f"{prefix}:{{{handle[:2]}}}:s:{handle[3:]}")
            before = process_time()
            raw.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            await eventually(lambda: len(closed) == len(over), timeout=30)
            cpu = process_time() - before
            raw.close()
            assert set(closed) == {CloseCode.SESSION_ENDED}
            assert cluster.stats().bus.gaps == 1
            print(f"\n{SOCKETS} sessions revalidated with {cpu:.2f} s of CPU")
            assert cpu < 2.0
            for socket in list(cluster._parts.hub._sockets.values()):
                cluster._parts.hub.unregister(socket)
