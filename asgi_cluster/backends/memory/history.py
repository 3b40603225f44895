"""The history of rooms, in memory."""

from __future__ import annotations

import secrets
from collections import deque
from itertools import islice

import msgspec

from asgi_cluster.backends.memory.broker import MemoryBroker
from asgi_cluster.backends.memory.expiring import Expiring
from asgi_cluster.ids import new_token
from asgi_cluster.rooms.history import (
    EPOCH_LASTS,
    JUMP,
    NUMBERING_OUTLIVES,
    ONCE,
    Declarations,
    Entry,
    Page,
    Position,
    seal_envelope,
)

__all__ = ["MemoryHistory"]


class _Numbering(msgspec.Struct):
    epoch: str
    offset: int = 0


class _Logs:
    def __init__(self, broker: MemoryBroker) -> None:
        self.numbering: Expiring[str, _Numbering] = Expiring(broker.clock)
        self.entries: Expiring[str, deque[Entry]] = Expiring(broker.clock)
        self.once: Expiring[str, Position] = Expiring(broker.clock)
        self.declared: dict[str, bytes] = {}
        self.epoch: Expiring[str, str] = Expiring(broker.clock)


class MemoryHistory:
    """``rooms.history.HistoryStore`` for ``memory://``."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._logs: _Logs = broker.part(_Logs)

    in_process = True

    async def declare(
        self, digest: str, rules: bytes, *, node: str, view: float, timeout: float
    ) -> Declarations:
        logs = self._logs
        with self._broker.lock:
            epoch = logs.epoch.get("")
            if epoch is None:
                epoch = new_token()
                logs.epoch.set("", epoch, self._broker.clock() + EPOCH_LASTS)
            if digest:
                logs.declared[node] = rules
            living = self._broker.nodes().keys() & logs.declared.keys()
            if living:
                logs.declared = {node: logs.declared[node] for node in living}
            others = {declared: node for node, declared in logs.declared.items() if declared != rules}
            return Declarations(epoch, 0.0, [(node, declared) for declared, node in others.items()])

    async def publish(
        self,
        room: str,
        payload: bytes,
        *,
        size: int,
        ttl: float,
        idempotency_key: str | None,
        epoch: str,
        timeout: float,
    ) -> Position:
        logs = self._logs
        # Room names hold no control characters, so no two pairs make one key.
        once = None if idempotency_key is None else f"{room}\n{idempotency_key}"
        with self._broker.lock:
            if once is not None and (done := logs.once.get(once)) is not None:
                return done
            now = self._broker.clock()
            numbering = self._numbering(room, epoch)
            previous = numbering.offset
            numbering.offset = (previous or JUMP * (1 + secrets.randbelow(JUMP))) + 1
            logs.numbering.set(room, numbering, now + ttl + NUMBERING_OUTLIVES)
            position = Position(numbering.offset, numbering.epoch)
            entries = logs.entries.get(room) or deque()
            entries.append(Entry(position.offset, previous, payload))
            while len(entries) > size:
                entries.popleft()
            logs.entries.set(room, entries, now + ttl)
            if once is not None:
                logs.once.set(once, position, now + ONCE)
            self._broker.publish(seal_envelope(position, previous, payload), room=room)
            return position

    def _numbering(self, room: str, epoch: str) -> _Numbering:
        numbering = self._logs.numbering.get(room)
        if numbering is None:
            numbering = _Numbering(epoch)
            self._logs.entries.pop(room)
        return numbering

    async def read(
        self,
        room: str,
        *,
        since: Position | None,
        limit: int | None,
        reverse: bool = False,
        epoch: str,
        ttl: float,
        timeout: float,
    ) -> Page:
        with self._broker.lock:
            numbering = self._numbering(room, epoch)
            if numbering.offset:
                self._logs.numbering.set(room, numbering, self._broker.clock() + ttl + NUMBERING_OUTLIVES)
            top = Position(numbering.offset, numbering.epoch)
            held = self._logs.entries.get(room) or deque()
            if since is None:
                return Page(list(islice(reversed(held) if reverse else held, limit)), top, True)
            if since.epoch != top.epoch:
                return Page([], top, False)
            # The chain of previous offsets shows whether anything between the position and the first entry
            # after it is missing.
            complete = since == top or any(entry.previous == since.offset for entry in held)
            if reverse:
                kept = (entry for entry in reversed(held) if entry.offset < since.offset)
            else:
                kept = (entry for entry in held if entry.offset > since.offset)
            return Page(list(islice(kept, limit)), top, complete)
