"""A Redis Cluster: every key, and every sharded channel, at the primary that has its slot at the moment."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.exceptions import AskError, MovedError, NoScriptError, RedisError, ResponseError

from asgi_cluster.backends.redis.address import HostPort
from asgi_cluster.backends.redis.errors import unavailable
from asgi_cluster.backends.redis.lifetime import Background, background
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.shard import Shard
from asgi_cluster.backends.redis.single import Routed
from asgi_cluster.backends.redis.slots import (
    SLOTS,
    View,
    parse_redirect,
    read_slots,
    slot_of,
    tags,
)
from asgi_cluster.backends.redis.urls import Target
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.tasks import Failing

__all__ = ["ClusterTopology"]

logger = logging.getLogger("asgi_cluster.redis")

_LOOK_EVERY = 10.0
_LOOK_WHILE_TROUBLED = 0.25
_READ_AT_ONCE = 5
_RETRY_PAUSE = 0.02


class ClusterTopology(Routed):
    """Redis Cluster ≥ 7.0.

    The table of slots is corrected by every redirect, and looked up again while there is trouble.
    """

    sharded = True

    def __init__(self, target: Target) -> None:
        self._seeds = target.addresses
        self._shards: dict[HostPort, Shard] = {}
        self._slots: View = [None] * SLOTS
        self._tasks: Background | None = None
        self._refresh_wanted = asyncio.Event()
        self._changed: Callable[[], None] | None = None

    @asynccontextmanager
    async def opened(self, failing: Failing | None = None) -> AsyncIterator[None]:
        async with background(failing) as tasks:
            self._tasks = tasks
            self._refresh_wanted = asyncio.Event()
            try:
                self._adopt(await read_slots(self._seeds))
                clients = [shard.commands for shard in self._shards.values()]
                await asyncio.gather(*[client.reconnecting.started for client in clients])
                tasks.keep(self._watch_slots, name="slots")
                yield
            finally:
                self._tasks = None
                self._shards.clear()
                self._slots = [None] * SLOTS

    # The table of slots

    async def _look(self) -> View | None:
        """By way of the shards, some at once: the healthy one with the newest epoch is right."""
        shards = [shard for shard in self._shards.values() if shard.commands.answering]
        some = random.sample(shards, min(len(shards), _READ_AT_ONCE))
        views = await asyncio.gather(*[shard.look() for shard in some])
        known = [view for view in views if view is not None]
        return max(known, key=lambda seen: seen[0])[1] if known else None

    async def _watch_slots(self) -> None:
        while True:
            pause = _LOOK_EVERY if self.answering and all(self._slots) else _LOOK_WHILE_TROUBLED
            try:
                async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):
                    await self._refresh_wanted.wait()
            except TimeoutError:
                pass
            self._refresh_wanted.clear()
            try:
                view = await self._look() or await read_slots(self._seeds)
            except StoreUnavailable as error:
                logger.debug("the slots could not be looked up: %s", error.reason)
                continue
            self._adopt(view)
            await asyncio.sleep(_RETRY_PAUSE)  # however often it is wanted

    def _adopt(self, view: View) -> None:
        assert self._tasks is not None
        changed, self._slots = view != self._slots, view
        places = set(filter(None, view))
        for place in places:
            self._shard(place)
        for place in self._shards.keys() - places:
            self._tasks.start(self._shards.pop(place).retire(), name="asgi-cluster retirement")
        if changed:
            self._homes_changed()

    def _shard(self, place: HostPort) -> Shard:
        shard = self._shards.get(place)
        if shard is None:
            assert self._tasks is not None
            shard = self._shards[place] = Shard(place, self._seeds[0].at(*place), self._tasks)
        return shard

    def _homes_changed(self) -> None:
        if self._changed is not None:
            self._changed()

    def _moved(self, error: MovedError, asked: HostPort) -> None:
        # The redirect is newer than the table; the rest of the table is looked up soon.
        slot, place = parse_redirect(error, asked)
        if self._slots[slot] != place:
            self._slots = [*self._slots[:slot], place, *self._slots[slot + 1 :]]
            self._shard(place)
            self._homes_changed()
        self.refresh_soon()

    # The port

    async def call(self, key: str, *args: str | bytes | int, timeout: float) -> Any:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        slot = slot_of(key)
        asking: HostPort | None = None
        failure: RedisError
        hops = 0
        while True:
            place = asking or self._slots[slot]
            try:
                if self._tasks is None:
                    raise StoreUnavailable("not connected")
                if place is None:
                    raise _SlotWithoutPrimary
                commands = self._shard(place).commands
                return await commands.call(*args, timeout=deadline - loop.time(), asking=asking is not None)
            except NoScriptError:
                raise
            except MovedError as error:
                assert place is not None
                self._moved(error, place)
                asking, failure = None, error
            except AskError as error:
                assert place is not None
                asking, failure = parse_redirect(error, place)[1], error
            except RedisError as error:
                self.refresh_soon()
                asking, failure, hops = None, error, hops + 5
            hops += 1
            if hops > 5:  # two servers that redirect to each other, or one that is not ready
                if loop.time() + _RETRY_PAUSE >= deadline:
                    raise unavailable(failure, sent=False) from failure
                await asyncio.sleep(_RETRY_PAUSE)

    def post(self, key: str, *args: str | bytes | int) -> bool:
        shard = self._home(key)
        return shard is not None and shard.commands.post(*args)

    def _home(self, key: str) -> Shard | None:
        place = self._slots[slot_of(key)]
        return None if place is None else self._shards.get(place)

    def run_id(self, key: str) -> str:
        shard = self._home(key)
        if shard is None:
            raise StoreUnavailable("no primary has this slot")
        return shard.commands.run_id

    @property
    def answering(self) -> bool:
        return bool(self._shards) and all(shard.commands.answering for shard in self._shards.values())

    def primaries(self) -> Sequence[Primary]:
        return [shard.primary for shard in self._shards.values()]

    def home(self, key: str) -> Primary | None:
        shard = self._home(key)
        return None if shard is None else shard.primary

    def tag_at(self, primary: Primary) -> str | None:
        shard = next((each for each in self._shards.values() if each.primary is primary), None)
        if shard is None:
            return None
        if shard.tag is None or self._slots[slot_of(shard.tag)] != shard.place:
            shard.tag = next((tag for tag in tags() if self._slots[slot_of(tag)] == shard.place), None)
        return shard.tag

    def watch(self, changed: Callable[[], None] | None) -> None:
        self._changed = changed

    def refresh_soon(self) -> None:
        self._refresh_wanted.set()

    def reconnect_now(self, primary: Primary) -> None:
        for shard in self._shards.values():
            if shard.primary is primary:
                shard.commands.reconnect_now()

    def __repr__(self) -> str:
        return f"<ClusterTopology of {len(self._shards)} primaries>"


class _SlotWithoutPrimary(ResponseError):
    """A slot without primary: as good as CLUSTERDOWN."""

    def __init__(self) -> None:
        super().__init__("CLUSTERDOWN no primary has this slot")
