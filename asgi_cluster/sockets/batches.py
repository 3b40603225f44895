"""The end of a loop tick: what it brought is written."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping
from time import perf_counter
from typing import Literal, Protocol

from asgi_cluster.ids import ConnectionId
from asgi_cluster.sockets.prepared import PreparedMessage

__all__ = ["Flusher", "SlowPolicy"]

_SLICE = 0.01  # seconds for which the flusher may block the loop: other work must not wait for a large room
_BATCH_BYTES = 1 << 16

SlowPolicy = Literal["disconnect", "drop", "latest"]
"""What happens to a message for a client that does not read: the client is closed, or the message is dropped,
or only the last one of each key is kept.
"""


class Outgoing(Protocol):
    """An ``Outbox``, as far as it is written to here. A Protocol, because the outbox's module imports this
    one.
    """

    def put(self, message: PreparedMessage, slow: SlowPolicy, key: Hashable) -> None: ...
    def write(self, frames: bytes, count: int) -> bool: ...
    def flush(self) -> None: ...
    def fail(self, error: Exception) -> None: ...


class SharedBatch:
    """What one room got during a tick, for all of its members alike."""

    __slots__ = ("members", "messages", "size", "started")

    def __init__(self, members: Mapping[ConnectionId, Outgoing]) -> None:
        self.members = members
        self.messages: list[tuple[PreparedMessage, SlowPolicy, Hashable]] = []
        self.size = 0
        self.started: list[Outgoing] | None = None
        """The outboxes that are still to be written to, once some have been."""


class Flusher:
    """Writes, at the end of a loop tick, what the outboxes of this loop got during it.

    In most ticks that is messages to one room. They are not put into each outbox but kept once, as a *shared
    batch*, and written to all members in one pass. Before anything else is put into an outbox, the shared
    batch is put into the outboxes (``scatter``): then each outbox holds what it would have held without it.
    So what is in an outbox always comes before the shared batch.
    """

    __slots__ = ("__weakref__", "_dirty", "_loop", "_scheduled", "batch")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._dirty: list[Outgoing] = []
        self._scheduled = False
        self.batch: SharedBatch | None = None

    def add(self, outbox: Outgoing) -> None:
        """``outbox`` has something to write."""
        self._dirty.append(outbox)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def broadcast(
        self,
        members: Mapping[ConnectionId, Outgoing],
        message: PreparedMessage,
        slow: SlowPolicy,
        key: Hashable,
    ) -> None:
        """A message to all of ``members``, who may not change while there is a shared batch."""
        batch = self.batch
        if batch is None:
            batch = self.batch = SharedBatch(members)
        elif batch.members is not members or batch.started is not None or batch.size > _BATCH_BYTES:
            # Several rooms may have members in common, and theirs belong in one write: not in a shared batch.
            self.scatter()
            for outbox in members.values():
                outbox.put(message, slow, key)
            return
        batch.messages.append((message, slow, key))
        batch.size += message.size
        self._schedule()

    def scatter(self) -> None:
        """Put what the shared batch carries into the outboxes of the members that it has not reached."""
        batch, self.batch = self.batch, None
        if batch is not None:
            for outbox in tuple(batch.members.values()) if batch.started is None else batch.started:
                for message in batch.messages:
                    outbox.put(*message)

    def _flush(self) -> None:
        until = perf_counter() + _SLICE
        if self._flush_outboxes(until) and self._flush_shared(until) and self._flush_outboxes(until):
            self._scheduled = False
        else:
            self._loop.call_soon(self._flush)

    def _flush_outboxes(self, until: float) -> bool:
        dirty, self._dirty = self._dirty, []
        for index, outbox in enumerate(dirty):
            outbox.flush()
            if index & 31 == 31 and perf_counter() > until:
                self._dirty = dirty[index + 1 :] + self._dirty
                break
        return not self._dirty

    def _flush_shared(self, until: float) -> bool:
        """True when it is over."""
        batch = self.batch
        if batch is None:
            return True
        members = list(batch.members.values()) if batch.started is None else batch.started
        messages = [message for message, _, _ in batch.messages]
        frames = (
            messages[0].frame if len(messages) == 1 else b"".join([message.frame for message in messages])
        )
        missed: list[Outgoing] = []
        failed: list[tuple[Outgoing, Exception]] = []
        done = len(members)
        for index, outbox in enumerate(members):
            try:
                if not outbox.write(frames, len(messages)):
                    missed.append(outbox)
            except Exception as error:
                failed.append((outbox, error))  # later: closing a socket would break the shared batch
            if index & 31 == 31 and perf_counter() > until:
                done = index + 1
                break
        batch.started = members[done:]
        self.batch = batch if batch.started else None
        for outbox in missed:
            for message in batch.messages:
                outbox.put(*message)
        for outbox, raised in failed:
            outbox.fail(raised)
        return self.batch is None
