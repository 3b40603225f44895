"""A primary of a Redis Cluster, as long as it has slots."""

from __future__ import annotations

import asyncio
import logging

from redis.exceptions import RedisError

from asgi_cluster.backends.redis.address import Address, HostPort
from asgi_cluster.backends.redis.client import PrimaryClient
from asgi_cluster.backends.redis.errors import ConnectionBroken, reason_of
from asgi_cluster.backends.redis.lifetime import Background
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.slots import View, facts_of, parse_slots
from asgi_cluster.exceptions import StoreUnavailable

__all__ = ["Shard"]

logger = logging.getLogger("asgi_cluster.redis")

_LAST_REPLIES = 1.0
_ANSWER = 0.5


class Shard:
    """A primary, its client, and the task that keeps the client connected."""

    def __init__(self, place: HostPort, address: Address, tasks: Background) -> None:
        self.place = place
        self.primary = Primary(address.dial, lambda: address.name, mode="cluster", minimum=(7, 0))
        self.commands = PrimaryClient(self.primary)
        self.task = tasks.keep(self.commands.reconnecting.run, name="commands")
        self.tag: str | None = None

    async def look(self) -> tuple[tuple[bool, int, int], View] | None:
        """Its facts of the Cluster, and its view of the slots; ``None`` when it does not answer."""
        try:
            info, slots = await asyncio.gather(
                self.commands.call("CLUSTER", "INFO", timeout=_ANSWER),
                self.commands.call("CLUSTER", "SLOTS", timeout=_ANSWER),
            )
        except (StoreUnavailable, RedisError):
            return None
        return facts_of(info), parse_slots(slots, self.place)

    async def retire(self) -> None:
        """It has no slots any more.

        What was sent to it is answered, most likely by a MOVED, and must not end as unknown.
        """
        try:
            await self.commands.drained(timeout=_LAST_REPLIES)
        except (TimeoutError, ConnectionBroken, RedisError) as error:
            logger.debug(
                "%s was closed before it had answered everything: %s", self.primary.name, reason_of(error)
            )
        finally:
            self.task.cancel()
