"""Sessions in this process's memory. Methods never wait, so they work on any loop and in any thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asgi_cluster.backends.memory.state import State, Stored
from asgi_cluster.ids import Handle, UserId
from asgi_cluster.sessions.store import Device, Draft, Ending, Record, WriteOutcome

__all__ = ["MemorySessionStore"]


class MemorySessionStore:
    """``sessions.store.SessionStore`` without a server."""

    def __init__(self, state: State) -> None:
        self._state = state

    def _living(self, handle: str) -> Stored | None:
        stored = self._state.sessions.get(handle)
        if stored is None:
            return None
        if stored.expires_at <= self._state.clock():
            self._state.drop(handle)
            return None
        user = stored.draft.user
        if user is not None and self._state.epochs.get(user) != stored.epoch:
            return None
        return stored

    async def read(self, handle: Handle, *, timeout: float) -> Record | None:
        """See ``SessionStore.read``."""
        with self._state.lock:
            stored = self._living(handle)
            if stored is None:
                return None
            now = self._state.clock()
            previous_for = stored.previous_until - now
            return Record(
                handle=handle,
                secret=stored.secret,
                previous=stored.previous if previous_for > 0 else None,
                previous_for=max(0.0, previous_for),
                user=stored.draft.user,
                version=stored.version,
                write_id=stored.write_id,
                created_at=stored.created_at,
                expires_in=stored.expires_at - now,
                absolute_in=stored.absolute_at - now,
                idle=stored.draft.idle,
                persistent=stored.draft.persistent,
                fields=dict(stored.fields),
            )

    async def create(self, draft: Draft, *, timeout: float) -> None:
        """See ``SessionStore.create``."""
        with self._state.lock:
            now = self._state.clock()
            epoch = ""
            if draft.user is not None:
                epoch = self._state.epochs.setdefault(draft.user, draft.epoch)
                self._state.by_user.setdefault(draft.user, set()).add(draft.handle)
            self._state.sessions[draft.handle] = Stored(
                draft=draft,
                secret=draft.secret,
                fields=dict(draft.fields),
                write_id=draft.write_id,
                epoch=epoch,
                created_at=now,
                seen_at=now,
                absolute_at=now + draft.absolute,
                expires_at=now + min(draft.idle, draft.absolute),
            )
            self._state.tidy()

    async def write(
        self,
        handle: Handle,
        *,
        changed: Mapping[str, bytes],
        removed: Sequence[str],
        write_id: str,
        expected: str | None,
        message: bytes,
        timeout: float,
    ) -> WriteOutcome:
        """See ``SessionStore.write``."""
        with self._state.lock:
            stored = self._living(handle)
            if stored is None:
                return "gone"
            if expected is not None and stored.write_id != expected:
                return "conflict"
            self._state.tell_everyone(message)
            for key in removed:
                stored.fields.pop(key, None)
            stored.fields.update(changed)
            stored.write_id = write_id
            stored.version += 1
            self._extend(stored)
            self._state.tidy()
            return "written"

    def _extend(self, stored: Stored) -> None:
        stored.seen_at = self._state.clock()
        stored.expires_at = min(stored.seen_at + stored.draft.idle, stored.absolute_at)

    async def touch(self, handle: Handle, *, timeout: float) -> bool:
        """See ``SessionStore.touch``."""
        with self._state.lock:
            stored = self._living(handle)
            if stored is None:
                return False
            self._extend(stored)
            return True

    async def rotate(
        self, handle: Handle, *, secret: bytes, current: bytes, grace: float, write_id: str, message: bytes, timeout: float
    ) -> WriteOutcome:
        """See ``SessionStore.rotate``."""
        with self._state.lock:
            stored = self._living(handle)
            if stored is None:
                return "gone"
            if stored.secret != current:
                return "conflict"
            self._state.tell_everyone(message)
            stored.previous, stored.previous_until = current, self._state.clock() + grace
            stored.secret = secret
            stored.write_id = write_id
            stored.version += 1
            return "written"

    async def end(self, handle: Handle, *, message: bytes, timeout: float) -> Ending:
        """See ``SessionStore.end``."""
        with self._state.lock:
            existed = self._living(handle) is not None
            self._state.tell_everyone(message)
            self._state.drop(handle)
            return Ending(sessions=int(existed), nodes=list(self._state.nodes))

    async def devices(self, user: UserId, *, timeout: float) -> Sequence[Device]:
        """See ``SessionStore.devices``."""
        with self._state.lock:
            now = self._state.clock()
            found = []
            for handle in list(self._state.by_user.get(user, ())):
                stored = self._living(handle)
                if stored is not None:
                    found.append(
                        Device(
                            handle=Handle(handle),
                            created_at=stored.created_at,
                            seen_at=stored.seen_at,
                            expires_in=stored.expires_at - now,
                            agent=stored.draft.agent,
                            address=stored.draft.address,
                        )
                    )
            return sorted(found, key=lambda device: device.seen_at, reverse=True)

    async def end_all(
        self, user: UserId, *, keep: Handle | None, epoch: str, message: bytes, timeout: float
    ) -> Ending:
        """See ``SessionStore.end_all``."""
        with self._state.lock:
            living = [handle for handle in self._state.by_user.get(user, ()) if self._living(handle) is not None]
            self._state.tell_everyone(message)
            kept = keep if keep in living else None
            for handle in list(self._state.by_user.get(user, ())):
                if handle != kept:
                    self._state.drop(handle)
            if kept is not None:
                self._state.epochs[user] = self._state.sessions[kept].epoch = epoch
            return Ending(sessions=len(living) - (kept is not None), nodes=list(self._state.nodes))

    async def lock(self, handle: Handle, *, token: str, hold: float, timeout: float) -> bool:
        """See ``SessionStore.lock``."""
        with self._state.lock:
            now = self._state.clock()
            held = self._state.locks.get(handle)
            if held is not None and held[1] > now:
                return False
            self._state.locks[handle] = (token, now + hold)
            return True

    async def unlock(self, handle: Handle, *, token: str, timeout: float) -> bool:
        """See ``SessionStore.unlock``."""
        with self._state.lock:
            held = self._state.locks.get(handle)
            if held is None or held[0] != token or held[1] <= self._state.clock():
                return False
            del self._state.locks[handle]
            return True
