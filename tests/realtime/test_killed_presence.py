"""How long a killed node's people stay in the presence of their rooms."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from asgi_cluster import Cluster, RealtimeConfig, RoomRule
from tests.realtime.site import Raw
from tests.realtime.test_centrifuge_python import sdk, subscribe
from tests.realtime.test_faults import as_node
from tests.support.nodes import serve_process
from tests.support.servers import start_valkey
from tests.support.waiting import eventually

_LIMIT = 6.0
_ROOMS = [f"kept:{number}" for number in range(10)]


async def measure(kills: int) -> list[float]:
    """Seconds from kill -9 until nobody of the node is in any of ten rooms, for each of ``kills`` nodes, one
    after another. Everybody else stays throughout.
    """
    async with AsyncExitStack() as stack:
        server = stack.enter_context(start_valkey())
        served = await stack.enter_async_context(
            serve_process("tests.realtime.members:app", 2, env={"ASGI_CLUSTER_URL": server.url})
        )
        rules = [RoomRule("kept:{name}", history=1000, presence=True)]
        reader = await stack.enter_async_context(
            Cluster(server.url, listen=False, realtime=RealtimeConfig(rules=rules))
        )

        async def present(room: str) -> set[str]:
            return {member.connection_id for member in await reader.room(room).presence()}

        async def enter(client: Raw) -> str:
            identity: str = (await client.call("connect", {}))["connect"]["client"]
            for room in _ROOMS:
                assert "subscribe" in await client.call("subscribe", {"channel": room})
            return identity

        for node in served:
            client, _ = await stack.enter_async_context(sdk(as_node(node)))  # answers pings meanwhile
            for room in _ROOMS:
                await subscribe(client, room)
        staying = await present(_ROOMS[0])
        assert len(staying) == len(served)
        took: list[float] = []
        loop = asyncio.get_running_loop()
        for _ in range(kills):
            async with serve_process(
                "tests.realtime.members:app", 1, env={"ASGI_CLUSTER_URL": server.url}
            ) as [doomed]:
                # Somewhere in the node's heartbeat, not always just after its first.
                await asyncio.sleep(0.37 * (len(took) % 3))
                async with AsyncExitStack() as going:
                    gone = {
                        await enter(await going.enter_async_context(as_node(doomed).raw(ping_interval=None)))
                        for _ in range(3)
                    }
                    assert await present(_ROOMS[0]) == staying | gone
                    before = loop.time()
                    doomed.kill()

                    async def empty(gone: set[str] = gone) -> bool:
                        left = [await present(room) for room in _ROOMS]
                        if not all(staying <= members for members in left):
                            raise RuntimeError("somebody living was reaped")
                        return not any(gone & members for members in left)

                    await eventually(empty, timeout=15, interval=0.02)
                    took.append(loop.time() - before)
        return took


@pytest.mark.faults
@pytest.mark.timeout(150)
async def test_people_of_killed_nodes_are_gone(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten nodes killed with kill -9, one after another: each one's people are gone within six seconds, and
    nobody else ever is.
    """
    took = sorted(await measure(10))
    with capsys.disabled():
        shown = " ".join(f"{seconds:.2f}" for seconds in took)
        print(f"\n  gone after {shown} s: median {took[len(took) // 2]:.2f}, most {took[-1]:.2f}", end="")
    assert took[-1] <= _LIMIT
