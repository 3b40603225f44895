"""A node stops when it is asked to, whatever happens to its connections meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from asgi_cluster.backends.redis.connection import MultiplexedConnection
from tests.bus.nodes import opened, our_tasks
from tests.support.topologies import SentinelSet
from tests.support.waiting import eventually

LINKS: dict[str, Callable[[Any], MultiplexedConnection | None]] = {
    "commands": lambda backend: backend._topology._commands._connection,
    "subscriber": lambda backend: next(iter(backend._subscribers._subscribers.values()))._connection,
    "sentinel": lambda backend: backend._topology._sentinels[0]._connection,
}


@pytest.mark.parametrize("name", LINKS)
async def test_a_connection_that_breaks_while_its_task_is_stopped(
    sentinel_set: SentinelSet, prefix: str, name: str
) -> None:
    """Whichever of the two comes first, by however many ticks of the loop: the task ends."""
    for ticks in range(10):
        async with opened(sentinel_set.url, prefix) as node:
            await eventually(lambda: LINKS[name](node.backend) is not None)
            link = LINKS[name](node.backend)
            tasks = [task for task in asyncio.all_tasks() if task.get_name() == f"asgi-cluster {name}"]
            assert link is not None
            link.abort("broken by the test")
            for _ in range(ticks):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            _, running = await asyncio.wait(tasks, timeout=10)
            for task in running:
                task.cancel()
            assert not running, f"cancelled {ticks} ticks after the connection broke"
        assert our_tasks() == []
