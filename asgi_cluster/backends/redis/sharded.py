"""A Redis Cluster: every key, and every sharded channel, at the primary that has its slot at the moment."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.exceptions import AskError, MovedError, NoScriptError, RedisError, ResponseError

from asgi_cluster.backends.redis.connection import MultiplexedConnection
from asgi_cluster.backends.redis.errors import ConnectionBroken, reason_of, unavailable
from asgi_cluster.backends.redis.lifetime import Background, background
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.shard import Shard
from asgi_cluster.backends.redis.single import Routed
from asgi_cluster.backends.redis.slots import (
    SLOTS,
    HostPort,
    View,
    facts_of,
    parse_redirect,
    parse_slots,
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
_ASKED_AT_ONCE = 5
_ANSWER = 0.5
_RETRY_PAUSE = 0.02


class ClusterTopology(Routed):
    """Redis Cluster ≥ 7.0.

    The table of slots is corrected by every redirect, and looked up again while there is trouble.
    """

    sharded = True

    def __init__(self, target: Target) -> None:
        self._seeds = target.addresses
        self._members: dict[HostPort, Shard] = {}
        self._slots: View = [None] * SLOTS
        self._tasks: Background | None = None
        self._refresh_wanted = asyncio.Event()
        self._changed: Callable[[], None] | None = None

    @asynccontextmanager
    async def opened(self, failing: Failing | None = None) -> AsyncIterator[None]:
        """See ``Topology.opened``."""
        async with background(failing) as tasks:
            self._tasks = tasks
            self._refresh_wanted = asyncio.Event()
            try:
                self._adopt(await self._look_from_outside())
                await asyncio.gather(*[member.started for member in self._members.values()])
                tasks.keep(self._watch_slots, name="slots")
                yield
            finally:
                self._tasks = None
                self._members.clear()
                self._slots = [None] * SLOTS

    # The table of slots

    async def _look_from_outside(self) -> View:
        """By way of the addresses in the URL, one after the other. Raises ``StoreUnavailable``."""
        assert self._tasks is not None
        told: list[str] = []
        for seed in self._seeds:
            try:
                link = await seed.dial()
                running = self._tasks.start(_until_broken(link), name="asgi-cluster slots link")
                try:
                    async with asyncio.timeout(_ANSWER):
                        # The other question too: a right that is missing should stop the start.
                        slots, _ = await asyncio.gather(
                            link.send("CLUSTER", "SLOTS"), link.send("CLUSTER", "INFO")
                        )
                        view = parse_slots(slots, seed.place)
                finally:
                    running.cancel()
                    await link.close()
            except (ConnectionBroken, RedisError, OSError) as error:
                told.append(f"{seed.name}: {_said(error)}")
                continue
            if any(view):
                return view
        raise StoreUnavailable("; ".join(told) or "no node of the Redis Cluster has slots")

    async def _look(self) -> View | None:
        """By way of the members, some at once: the healthy one with the newest epoch is right."""
        members = [member for member in self._members.values() if member.commands.answering]
        asked = random.sample(members, min(len(members), _ASKED_AT_ONCE))
        views = await asyncio.gather(*[self._ask(member) for member in asked])
        known = [view for view in views if view is not None]
        return max(known, key=lambda seen: seen[0])[1] if known else None

    async def _ask(self, member: Shard) -> tuple[tuple[bool, int, int], View] | None:
        try:
            info, slots = await asyncio.gather(
                member.commands.call("CLUSTER", "INFO", timeout=_ANSWER),
                member.commands.call("CLUSTER", "SLOTS", timeout=_ANSWER),
            )
        except (StoreUnavailable, RedisError):
            return None
        return facts_of(info), parse_slots(slots, member.place)

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
                view = await self._look() or await self._look_from_outside()
            except StoreUnavailable as error:
                logger.debug("the slots could not be looked up: %s", error.reason)
                continue
            self._adopt(view)
            await asyncio.sleep(_RETRY_PAUSE)  # however many doubts there are

    def _adopt(self, view: View) -> None:
        assert self._tasks is not None
        changed, self._slots = view != self._slots, view
        places = set(filter(None, view))
        for place in places:
            self._member(place)
        for place in self._members.keys() - places:
            self._tasks.start(self._members.pop(place).retire(), name="asgi-cluster retirement")
        if changed:
            self._tell()

    def _member(self, place: HostPort) -> Shard:
        member = self._members.get(place)
        if member is None:
            assert self._tasks is not None
            member = self._members[place] = Shard(place, self._seeds[0].at(*place), self._tasks)
        return member

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed()

    def _moved(self, error: MovedError, asked: HostPort) -> None:
        # The redirect is newer than the table; the rest of the table is looked up soon.
        slot, place = parse_redirect(error, asked)
        if self._slots[slot] != place:
            self._slots = [*self._slots[:slot], place, *self._slots[slot + 1 :]]
            self._member(place)
            self._tell()
        self.refresh_soon()

    # The port

    async def call(self, key: str, *args: str | bytes | int, timeout: float) -> Any:
        """See ``Topology.call``."""
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
                commands = self._member(place).commands
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
            if hops > 5:  # two nodes that send us to and fro, or one that is not ready
                if loop.time() + _RETRY_PAUSE >= deadline:
                    raise unavailable(failure, sent=False) from failure
                await asyncio.sleep(_RETRY_PAUSE)

    def post(self, key: str, *args: str | bytes | int) -> bool:
        """See ``Topology.post``."""
        member = self._home(key)
        return member is not None and member.commands.post(*args)

    def _home(self, key: str) -> Shard | None:
        place = self._slots[slot_of(key)]
        return None if place is None else self._members.get(place)

    def run_id(self, key: str) -> str:
        """See ``Topology.run_id``."""
        member = self._home(key)
        if member is None:
            raise StoreUnavailable("no primary has this slot")
        return member.commands.run_id

    @property
    def answering(self) -> bool:
        """See ``Topology.answering``."""
        return bool(self._members) and all(member.commands.answering for member in self._members.values())

    def primaries(self) -> Sequence[Primary]:
        """See ``Topology.primaries``."""
        return [member.primary for member in self._members.values()]

    def home(self, key: str) -> Primary | None:
        """See ``Topology.home``."""
        member = self._home(key)
        return None if member is None else member.primary

    def tag_at(self, primary: Primary) -> str | None:
        """See ``Topology.tag_at``."""
        member = next((each for each in self._members.values() if each.primary is primary), None)
        if member is None:
            return None
        if member.tag is None or self._slots[slot_of(member.tag)] != member.place:
            member.tag = next((tag for tag in tags() if self._slots[slot_of(tag)] == member.place), None)
        return member.tag

    def watch(self, changed: Callable[[], None] | None) -> None:
        """See ``Topology.watch``."""
        self._changed = changed

    def refresh_soon(self) -> None:
        """See ``Topology.refresh_soon``."""
        self._refresh_wanted.set()

    def reconnect_now(self, primary: Primary) -> None:
        """See ``Topology.reconnect_now``."""
        for member in self._members.values():
            if member.primary is primary:
                member.commands.reconnect_now()

    def __repr__(self) -> str:
        return f"<ClusterTopology of {len(self._members)} primaries>"


async def _until_broken(link: MultiplexedConnection) -> None:
    try:
        await link.run()
    except ConnectionBroken:
        return  # its callers have got the error


class _SlotWithoutPrimary(ResponseError):
    """A slot without primary: as good as CLUSTERDOWN."""

    def __init__(self) -> None:
        super().__init__("CLUSTERDOWN no primary has this slot")


def _said(error: BaseException) -> str:
    if "cluster support disabled" in str(error):
        return "this is no Redis Cluster: its URL starts with redis://"
    return reason_of(error)
