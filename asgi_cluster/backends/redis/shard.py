"""A primary of a Redis Cluster, as long as it has slots."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from redis.exceptions import RedisError

from asgi_cluster.backends.redis.client import PrimaryClient
from asgi_cluster.backends.redis.errors import ConnectionBroken, reason_of
from asgi_cluster.backends.redis.lifetime import Background
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.slots import HostPort
from asgi_cluster.backends.redis.urls import Address

__all__ = ["Shard"]

logger = logging.getLogger("asgi_cluster.redis")

_FAREWELL = 1.0


class Shard:
    """A primary, its command link, and the task that keeps it."""

    def __init__(self, place: HostPort, address: Address, tasks: Background) -> None:
        self.place = place
        self.primary = Primary(address.dial, lambda: address.name, mode="cluster", minimum=(7, 0))
        self.commands = PrimaryClient(self.primary)
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.task = tasks.keep(partial(self.commands.run, self.started), name="commands")
        self.tag: str | None = None

    async def retire(self) -> None:
        """It has no slots any more.

        What was sent to it is answered, most likely by a MOVED, and must not end as unknown.
        """
        try:
            await self.commands.drained(timeout=_FAREWELL)
        except (TimeoutError, ConnectionBroken, RedisError) as error:
            logger.debug(
                "%s was closed before it had answered everything: %s", self.primary.name, reason_of(error)
            )
        finally:
            self.task.cancel()
