"""One node writes, another reads through its cache, and what the reader says of itself is held against it."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from contextlib import AsyncExitStack
from typing import Self

import msgspec

from asgi_cluster.bus.lease import boot_clock
from asgi_cluster.bus.messages import Changed, MalformedMessage, decode, encode
from asgi_cluster.bus.session_bus import SUBSCRIBED_AGAIN
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, new_token
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.reads import SessionReader
from asgi_cluster.sessions.store import Change
from tests.bus.nodes import LEASE, Node, Receiver, opened
from tests.contract.drafts import create

DEADLINE = 1.0
_SESSIONS = 16
_LOOK_EVERY = 0.01
_SILENCE = 1.5
"""Seconds without an answer after which a node may not call the store alive."""
_MOMENT = 0.2


class CacheReceiver(Receiver):
    """Does with what arrives what the cluster's dispatch does."""

    cache: SessionCache

    def session_message(self, payload: bytes) -> None:
        try:
            message = decode(payload)
        except MalformedMessage:
            self.cache.flush()
            return
        if isinstance(message, Changed):
            self.cache.drop(Handle(message.handle))

    def sessions_gap(self, reason: str, buckets: frozenset[int] | None) -> None:
        super().sessions_gap(reason, buckets)
        self.cache.flush(buckets)


class Health:
    """``ready`` and ``stats`` of one node, looked at all the time."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.answered = 0.0
        """When the store last answered for a session that the bus could not vouch for."""
        self.untrue: dict[str, None] = {}
        self.unready = 0.0
        """Seconds for which it said that it should get no traffic."""

    async def watch(self) -> None:
        """Until cancelled. A statement is untrue when it has been wrong for a moment: news take a while."""
        last = time.monotonic()
        since: dict[str, float] = {}
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            now = time.monotonic()
            ready, trusted = self._node.backend.ready, self._node.backend.stats().lease_remaining > 0
            silent, lately = now - self.answered > _SILENCE, now - self.answered < _MOMENT
            wrong = {
                "not ready while it was trusted": not ready and trusted,
                "not ready though neither answered": not ready and not trusted and silent,
                "ready while only the store answered": ready and not trusted and lately,
            }
            for statement, holds in wrong.items():
                began = since.setdefault(statement, now) if holds else since.pop(statement, now)
                if holds and now - began > _MOMENT:
                    self.untrue[statement] = None
            if not ready:
                self.unready += now - last
            last = now

    def judge_the_end(self) -> None:
        """When everything is over."""
        stats = self._node.backend.stats()
        gaps = [event for event in self._node.receiver.of("gap") if event[1] != SUBSCRIBED_AGAIN]
        ends = {
            "not ready in the end": self._node.backend.ready,
            "not connected in the end": stats.connected,
            "not trusted in the end": stats.lease_remaining > 0,
            f"{stats.gaps} gaps counted, {len(gaps)} reported": stats.gaps == len(gaps),
            "a gap without a reason": (stats.last_gap is not None) == bool(gaps),
        }
        self.untrue |= {text: None for text, holds in ends.items() if not holds}


class Traffic:
    """``async with``: 16 sessions that a writer at ``url`` changes, and a reader at ``faulted`` reads."""

    def __init__(self, url: str, faulted: str) -> None:
        self._urls = url, faulted
        self._stack = AsyncExitStack()
        self._running: list[asyncio.Task[None]] = []
        self._confirmed: dict[Handle, tuple[list[float], list[int]]] = {}
        self.reads = self.hits = self.refused = 0
        self.longest = 0.0
        self.stale_from_cache: list[float] = []
        """When a read was older than the lease although it came from the cache."""
        self.stale_from_store: list[float] = []
        """When one was that the store itself had answered."""
        self.last_beat = 0.0
        """When the last heartbeat was sent that the reader's server took."""

    async def __aenter__(self) -> Self:
        url, faulted = self._urls
        prefix = f"f{new_token()}"
        receiver = CacheReceiver()
        self.writer = await self._stack.enter_async_context(opened(url, prefix, listen=False))
        self.reader = await self._stack.enter_async_context(opened(faulted, prefix, receiver=receiver))
        self._cache = receiver.cache = SessionCache(self.reader.session_bus.lease, ttl=30, max_entries=1000)
        self._store = SessionReader(self.reader.backend.store, self._cache)
        handles = [(await create(self.writer.backend.store)).handle for _ in range(_SESSIONS)]
        self._confirmed = {handle: ([0.0], [0]) for handle in handles}
        self.health = Health(self.reader)
        work = (self._write(handles), self._read(handles, 0), self._read(handles, 5), self.health.watch())
        self._running = [asyncio.ensure_future(each) for each in work]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            await self.stop()
        finally:
            await self._stack.aclose()

    async def stop(self) -> None:
        """No more of it. Raises what went wrong in it."""
        running, self._running = self._running, []
        for task in running:
            task.cancel()
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    @property
    def stale(self) -> int:
        """Reads older than the lease."""
        return len(self.stale_from_cache) + len(self.stale_from_store)

    async def _write(self, handles: list[Handle]) -> None:
        number = 0
        while True:
            number += 1
            handle = handles[number % len(handles)]
            try:
                outcome = await self.writer.backend.store.write(
                    handle,
                    Change(changed={"n": msgspec.msgpack.encode(number)}, write_id=new_token()),
                    message=encode(Changed(handle, "writer")),
                    timeout=DEADLINE,
                )
            except StoreUnavailable:
                outcome = "gone"
            if outcome == "written":
                times, numbers = self._confirmed[handle]
                times.append(time.monotonic())
                numbers.append(number)
            await asyncio.sleep(0.003)

    async def _read(self, handles: list[Handle], turn: int) -> None:
        while True:
            turn += 1
            handle = handles[turn % len(handles)]
            asked = time.monotonic()
            before = self._cache.stats().hits
            lease = self.reader.session_bus.lease(int(handle[:2], 16))
            vouched = lease.live
            self.last_beat = max(
                self.last_beat, asked + lease.until - LEASE - boot_clock() if vouched else 0.0
            )
            try:
                entry = await self._store.read(handle, timeout=DEADLINE)
            except StoreUnavailable:
                self.refused += 1
            else:
                cached = self._cache.stats().hits > before
                self.hits += cached
                now = time.monotonic()
                if not vouched:
                    self.health.answered = now
                times, numbers = self._confirmed[handle]
                bound = numbers[bisect_right(times, now - LEASE) - 1]
                if entry.record is not None:
                    number = msgspec.msgpack.decode(entry.record.fields.get("n", b"\x00"))
                    if number < bound:
                        (self.stale_from_cache if cached else self.stale_from_store).append(now)
            self.reads += 1
            self.longest = max(self.longest, time.monotonic() - asked)
            await asyncio.sleep(0.001)
