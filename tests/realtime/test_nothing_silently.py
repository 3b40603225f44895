"""200 clients in 50 rooms each, while Redis, the bus and a node fail: whole, or told, and counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from asgi_cluster import Cluster, RealtimeConfig, RoomRule
from tests.realtime.follower import Follower
from tests.realtime.test_faults import broadcast
from tests.support.nodes import serve_process
from tests.support.proxy import Proxy
from tests.support.servers import start_valkey
from tests.support.waiting import eventually

_CLIENTS = 200
_ROOMS = [f"kept:{number}" for number in range(50)]
_ROUNDS = 4  # messages to every room while a fault holds


@pytest.mark.faults
@pytest.mark.timeout(180)
async def test_every_subscriber_is_whole_or_told(capsys: pytest.CaptureFixture[str]) -> None:
    """With history in Redis, through a cut bus, a restart with data and a killed node, all 10 000
    subscriptions get the whole ordered sequence; after an empty restart each is told, or has it.
    """
    async with AsyncExitStack() as stack:
        server = stack.enter_context(start_valkey("--appendonly", "yes", "--appendfsync", "always"))
        proxy = await stack.enter_async_context(Proxy(server.url))
        app = "tests.realtime.plain_members:app"
        behind = await stack.enter_async_context(serve_process(app, 1, env={"ASGI_CLUSTER_URL": proxy.url}))
        nodes = behind + await stack.enter_async_context(
            serve_process(app, 2, env={"ASGI_CLUSTER_URL": server.url})
        )
        publisher = await stack.enter_async_context(
            Cluster(
                server.url,
                listen=False,
                realtime=RealtimeConfig(rules=[RoomRule("kept:{name}", history=1000)]),
            )
        )
        endpoints = [f"{node.ws_url}/realtime/websocket" for node in nodes]
        followers = [Follower(endpoints, _ROOMS, first) for first in range(_CLIENTS)]
        following = await stack.enter_async_context(asyncio.TaskGroup())
        tasks = [following.create_task(follower.run()) for follower in followers]
        stack.callback(lambda: [task.cancel() for task in tasks])
        sent = 0

        async def publish(rounds: int) -> None:
            nonlocal sent
            for _ in range(rounds):
                number, sent = sent, sent + 1
                await asyncio.gather(*(broadcast(publisher, room, number) for room in _ROOMS))

        async def there() -> bool:
            """Everybody stands where the rooms stand: has what there is, or was told that it has not."""
            pages = await asyncio.gather(*(publisher.room(room).history(limit=0) for room in _ROOMS))
            top = {room: (page.epoch, page.offset) for room, page in zip(_ROOMS, pages, strict=True)}
            return all(
                follower.settled
                and all((seen.epoch, seen.offset) == top[room] for room, seen in follower.rooms.items())
                for follower in followers
            )

        def arrived() -> bool:
            return all(
                follower.settled and all(seen.last == sent - 1 for seen in follower.rooms.values())
                for follower in followers
            )

        async def through(name: str, begin: Callable[[], object], end: Callable[[], object]) -> Counter[str]:
            loop = asyncio.get_running_loop()
            started = loop.time()
            publishing = asyncio.create_task(publish(_ROUNDS))
            await asyncio.sleep(0)
            begin()
            await asyncio.sleep(0.3)
            end()
            await publishing
            healed = loop.time()
            # One more when everybody is back, so that nobody is whole only for want of a message.
            await eventually(there, timeout=30, interval=0.1, message=f"{name}: not all are back")
            await publish(1)
            await eventually(arrived, timeout=30, interval=0.1, message=f"{name}: not all have the last")
            count: Counter[str] = Counter()
            for follower in followers:
                for seen in follower.rooms.values():
                    count[
                        "whole" if seen.whole and not seen.wrong else "told" if seen.told else "silent"
                    ] += 1
                    count["wrong"] += seen.wrong
            codes = Counter(code for follower in followers for code in follower.codes)
            with capsys.disabled():
                print(
                    f"\n  {name}: {dict(count)}, published in {healed - started:.1f} s,"
                    f" all there {loop.time() - healed:.1f} s later; closes so far {dict(codes)}",
                    end="",
                )
            return count

        await eventually(lambda: all(follower.settled for follower in followers), timeout=30, interval=0.1)
        every = {"whole": _CLIENTS * len(_ROOMS), "wrong": 0}
        assert await through("bus cut", proxy.cut, proxy.heal) == every
        assert await through("restart with data", server.kill, lambda: server.restart(data=True)) == every
        assert await through("node killed", nodes[2].kill, lambda: None) == every
        count = await through("restart empty", server.kill, lambda: server.restart(data=False))
        assert count["whole"] + count["told"] == _CLIENTS * len(_ROOMS)
        assert count["wrong"] == 0
        assert count["told"] > 0
