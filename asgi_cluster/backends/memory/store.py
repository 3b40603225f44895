"""Sessions in memory: what the scripts do in Redis, under the broker's lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from asgi_cluster.backends.memory.broker import MemoryBroker
from asgi_cluster.backends.memory.expiring import Expiring
from asgi_cluster.bus.messages import name_ended
from asgi_cluster.ids import Handle, UserId
from asgi_cluster.sessions.store import (
    LOGOUT_KEPT,
    Change,
    Device,
    EndResult,
    NewSession,
    Record,
    UserLogout,
    WriteOutcome,
)

__all__ = ["MemorySessionStore"]


class _Stored(msgspec.Struct, kw_only=True):
    secret: bytes
    user: UserId | None
    fields: dict[str, bytes]
    write_id: str
    created: float
    seen: float
    idle: float
    absolute_at: float
    persistent: bool
    agent: str
    address: str
    version: int = 1
    previous: bytes | None = None
    previous_until: float = 0.0


class _Logout(msgspec.Struct, kw_only=True):
    id: str
    at: float
    keep: Handle | None
    before: float | None


class _Sessions:
    """All records, and which of them belong to whom."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.records: Expiring[Handle, _Stored] = Expiring(broker.clock, on_expired=self.forget)
        self.of_user: dict[UserId, set[Handle]] = {}
        self.locks: Expiring[Handle, str] = Expiring(broker.clock)
        self.logouts: Expiring[UserId, _Logout] = Expiring(broker.clock)

    def forget(self, handle: Handle, stored: _Stored) -> None:
        """Take a record that is gone out of its user's index."""
        if stored.user is not None:
            handles = self.of_user.get(stored.user, set())
            handles.discard(handle)
            if not handles:
                self.of_user.pop(stored.user, None)

    def remove(self, handle: Handle) -> bool:
        """Whether there was one."""
        stored = self.records.pop(handle)
        if stored is None:
            return False
        self.forget(handle, stored)
        return True


class MemorySessionStore:
    """``sessions.store.SessionStore`` for ``memory://``. Nothing here suspends, so ``timeout`` is never
    reached.
    """

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._sessions: _Sessions = broker.part(_Sessions)

    def run_id(self, bucket: int) -> str:
        """See ``RecordStore.run_id``: what is lost here is lost with the process."""
        return ""

    async def read(self, handle: Handle, *, timeout: float) -> Record | None:
        with self._broker.lock:
            stored = self._sessions.records.get(handle)
            if stored is None:
                return None
            now = self._broker.clock()
            previous_for = max(0.0, stored.previous_until - now)
            return Record(
                handle=handle,
                secret=stored.secret,
                previous=stored.previous if previous_for else None,
                previous_for=previous_for,
                user=stored.user,
                version=stored.version,
                write_id=stored.write_id,
                created_at=stored.created,
                expires_in=self._sessions.records.until(handle) - now,
                absolute_in=stored.absolute_at - now,
                idle=stored.idle,
                persistent=stored.persistent,
                fields=dict(stored.fields),
            )

    async def create(self, new: NewSession, *, timeout: float) -> float:
        with self._broker.lock:
            now = self._broker.clock()
            self._sessions.remove(new.handle)
            stored = _Stored(
                secret=new.secret,
                user=new.user,
                fields=dict(new.fields),
                write_id=new.write_id,
                created=self._broker.unix(),
                seen=self._broker.unix(),
                idle=new.idle,
                absolute_at=now + new.absolute,
                persistent=new.persistent,
                agent=new.agent,
                address=new.address,
            )
            self._sessions.records.set(new.handle, stored, now + min(new.idle, new.absolute))
            if new.user is not None:
                self._sessions.of_user.setdefault(new.user, set()).add(new.handle)
            return stored.created

    async def write(
        self,
        handle: Handle,
        change: Change,
        *,
        message: bytes,
        ended: bytes = b"",
        timeout: float,
    ) -> WriteOutcome:
        with self._broker.lock:
            stored = self._sessions.records.get(handle)
            if stored is None:
                return "gone"
            if change.expected not in (None, stored.write_id):
                return "conflict"
            fields = {key: value for key, value in stored.fields.items() if key not in change.removed}
            fields.update(change.changed)
            if fields == stored.fields:
                self._extend(handle, stored)
                return "unchanged"
            if ended and not fields and stored.user is None:
                self._broker.publish(ended)
                self._sessions.remove(handle)
                return "ended"
            self._broker.publish(message)
            stored.fields = fields
            stored.write_id = change.write_id
            stored.version += 1
            self._extend(handle, stored)
            return "written"

    def _extend(self, handle: Handle, stored: _Stored) -> None:
        stored.seen = self._broker.unix()
        self._sessions.records.set(
            handle, stored, min(self._broker.clock() + stored.idle, stored.absolute_at)
        )

    async def touch(self, handle: Handle, *, timeout: float) -> bool:
        with self._broker.lock:
            stored = self._sessions.records.get(handle)
            if stored is None:
                return False
            self._extend(handle, stored)
            return True

    async def rotate(
        self,
        handle: Handle,
        *,
        secret: bytes,
        current: bytes,
        grace: float,
        write_id: str,
        message: bytes,
        timeout: float,
    ) -> WriteOutcome:
        with self._broker.lock:
            stored = self._sessions.records.get(handle)
            if stored is None:
                return "gone"
            if stored.secret != current:
                return "conflict"
            self._broker.publish(message)
            stored.previous, stored.previous_until = current, self._broker.clock() + grace
            stored.secret = secret
            stored.write_id = write_id
            stored.version += 1
            return "written"

    async def end(
        self, handle: Handle, *, message: bytes, expected: str | None = None, timeout: float
    ) -> EndResult:
        with self._broker.lock:
            nodes = list(self._broker.nodes())
            stored = self._sessions.records.get(handle)
            if stored is not None and expected not in (None, stored.write_id):
                return EndResult(sessions=0, nodes=(), overtaken=stored.write_id, fields=dict(stored.fields))
            self._broker.publish(message)
            return EndResult(sessions=int(self._sessions.remove(handle)), nodes=nodes)

    async def devices(self, user: UserId, *, timeout: float) -> Sequence[Device]:
        with self._broker.lock:
            now = self._broker.clock()
            records = self._sessions.records
            living = [
                (handle, stored)
                for handle in sorted(self._sessions.of_user.get(user, ()))
                if (stored := records.get(handle)) is not None
            ]
            found = [
                Device(
                    handle=handle,
                    created_at=stored.created,
                    seen_at=stored.seen,
                    expires_in=records.until(handle) - now,
                    agent=stored.agent,
                    address=stored.address,
                )
                for handle, stored in living
            ]
        return sorted(found, key=lambda device: device.seen_at, reverse=True)

    async def end_all(
        self, user: UserId, *, keep: Handle | None, epoch: str, message: bytes, timeout: float
    ) -> EndResult:
        """See ``UserStore.end_all``. Removing the records is all it takes here: nothing can come in
        between.
        """
        with self._broker.lock:
            nodes = list(self._broker.nodes())
            mine = self._sessions.of_user.get(user, set())
            ended = sorted(mine - {keep})
            self._logged_out(user, epoch, None if keep in mine else keep)
            self._broker.publish(name_ended(message, [handle[3:] for handle in ended]))
            count = sum(self._sessions.remove(handle) for handle in ended)
            return EndResult(sessions=count, nodes=nodes, handles=ended)

    def _logged_out(self, user: UserId, name: str, keep: Handle | None) -> None:
        logouts, now = self._sessions.logouts, self._broker.clock()
        last = logouts.get(user)
        before = None if keep is None or last is None else last.before if last.keep == keep else last.at
        logouts.set(user, _Logout(id=name, at=now, keep=keep, before=before), now + LOGOUT_KEPT)

    async def logouts(self, users: Sequence[UserId], *, timeout: float) -> Mapping[UserId, UserLogout]:
        with self._broker.lock:
            now = self._broker.clock()
            return {
                user: UserLogout(
                    id=last.id,
                    ago=now - last.at,
                    keep=last.keep,
                    before=None if last.before is None else now - last.before,
                )
                for user in users
                if (last := self._sessions.logouts.get(user)) is not None
            }

    async def lock(self, handle: Handle, *, token: str, hold: float, timeout: float) -> bool:
        with self._broker.lock:
            if self._sessions.locks.get(handle) is not None:
                return False
            self._sessions.locks.set(handle, token, self._broker.clock() + hold)
            return True

    async def unlock(self, handle: Handle, *, token: str, timeout: float) -> bool:
        with self._broker.lock:
            if self._sessions.locks.get(handle) != token:
                return False
            self._sessions.locks.pop(handle)
            return True
