"""History and presence of rooms in this process's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from asgi_cluster.backends.memory.state import Log, State
from asgi_cluster.realtime.history import Entry, Page, Position, seal_envelope

__all__ = ["MemoryHistory", "MemoryPresence"]

_NAMED_FOR = 24 * 3600.0
_ONCE_FOR = 300.0


class MemoryHistory:
    """``realtime.history.HistoryStore`` without a server."""

    def __init__(self, state: State) -> None:
        self._state = state

    def _log(self, room: str, epoch: str, ttl: float) -> Log:
        now = self._state.clock()
        log = self._state.logs.get(room)
        if log is None or log.named_until <= now:
            log = self._state.logs[room] = Log(epoch)
            log.named_until = now + max(_NAMED_FOR, ttl)
        if log.expires_at <= now:
            log.entries.clear()
        return log

    async def publish(
        self, room: str, payload: bytes, *, size: int, ttl: float, idempotency_key: str | None, epoch: str, timeout: float
    ) -> Position:
        """See ``HistoryStore.publish``."""
        with self._state.lock:
            now = self._state.clock()
            if idempotency_key is not None:
                result = self._state.once.get((room, idempotency_key))
                if result is not None and result[2] > now:
                    return Position(result[0], result[1])
            log = self._log(room, epoch, ttl)
            position, previous = Position(log.offset + 1, log.epoch), log.offset
            self._state.tell_room(room, seal_envelope(position, previous, payload))
            log.offset = position.offset
            log.entries.append(Entry(position.offset, previous, payload))
            del log.entries[:-size]
            log.expires_at = now + ttl
            log.named_until = now + max(_NAMED_FOR, ttl)
            if idempotency_key is not None:
                self._state.once[room, idempotency_key] = (position.offset, position.epoch, now + _ONCE_FOR)
            self._state.tidy()
            return position

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
        """See ``HistoryStore.read``."""
        with self._state.lock:
            log = self._log(room, epoch, ttl)
            top = Position(log.offset, log.epoch)
            entries = log.entries
            complete = True
            if since is not None:
                if since.epoch != log.epoch:
                    return Page([], top, False)
                complete = since.offset == log.offset or any(entry.previous == since.offset for entry in entries)
                if reverse:
                    entries = [entry for entry in entries if entry.offset < since.offset]
                else:
                    entries = [entry for entry in entries if entry.offset > since.offset]
            chosen = entries[::-1] if reverse else entries[:]
            return Page(chosen if limit is None else chosen[:limit], top, complete)


class MemoryPresence:
    """``realtime.presence.PresenceStore`` without a server."""

    def __init__(self, state: State, node: Callable[[], str]) -> None:
        self._state = state
        self._node = node

    async def enter(self, room: str, client: str, info: bytes, *, timeout: float) -> None:
        """See ``PresenceStore.enter``."""
        with self._state.lock:
            self._state.present.setdefault(room, {})[client] = (self._node(), info)

    async def leave(self, room: str, client: str, *, timeout: float) -> bool:
        """See ``PresenceStore.leave``."""
        with self._state.lock:
            members = self._state.present.get(room, {})
            found = members.pop(client, None) is not None
            if not members:
                self._state.present.pop(room, None)
            return found

    async def members(self, room: str, *, timeout: float) -> Mapping[str, bytes]:
        """See ``PresenceStore.members``."""
        with self._state.lock:
            nodes = self._state.nodes
            return {c: info for c, (node, info) in self._state.present.get(room, {}).items() if node in nodes}

    async def stats(self, room: str, *, timeout: float) -> tuple[int, int]:
        """See ``PresenceStore.stats``."""
        members = await self.members(room, timeout=timeout)
        return len(members), len({str(msgspec.json.decode(info).get("user", "")) for info in members.values()})

    async def reap(self, room: str, node: str, incarnation: str, *, timeout: float) -> Mapping[str, bytes]:
        """See ``PresenceStore.reap``."""
        with self._state.lock:
            members = self._state.present.get(room, {})
            dead = {client: info for client, (owner, info) in members.items() if owner == node}
            for client in dead:
                del members[client]
            return dead
