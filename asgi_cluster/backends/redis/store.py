"""Sessions in Redis: one hash per session, one script per operation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.scripts import load
from asgi_cluster.backends.redis.topology import Topology
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, UserId, bucket_of
from asgi_cluster.sessions.store import Device, Draft, Ending, Record, WriteOutcome

__all__ = ["RedisSessionStore"]

logger = logging.getLogger("asgi_cluster.redis")

_OUTCOMES: Mapping[int, WriteOutcome] = {1: "written", 0: "gone", -1: "conflict"}


class RedisSessionStore:
    """``sessions.store.SessionStore`` on Redis ≥ 6.2 or Valkey.

    Meta fields of a session's hash start with ``@``, the application's with ``.``. Times are milliseconds of the server's clock.
    """

    def __init__(self, topology: Topology, names: Names) -> None:
        self._topology = topology
        self._names = names
        self._publish = "SPUBLISH" if topology.sharded else "PUBLISH"
        self.corrupt = 0
        """Records that could not be understood, since start."""

    async def read(self, handle: Handle, *, timeout: float) -> Record | None:
        """See ``SessionStore.read``. A record that cannot be understood is logged, counted and treated as missing."""
        try:
            reply = await self._run("session_read", handle, [], timeout=timeout)
        except StoreUnavailable as error:
            if "WRONGTYPE" not in error.reason:
                raise
            self._misread(handle)
            return None
        if reply is None:
            return None
        try:
            return _record(handle, *reply)
        except (KeyError, ValueError, UnicodeDecodeError):
            self._misread(handle)
            return None

    def _misread(self, handle: Handle) -> None:
        self.corrupt += 1
        logger.error("the record of session %s is corrupt: treated as missing", handle)

    async def create(self, draft: Draft, *, timeout: float) -> None:
        """See ``SessionStore.create``."""
        args: list[str | bytes | int] = [
            draft.handle[3:],
            draft.user or "",
            draft.epoch,
            _ms(draft.idle),
            _ms(draft.absolute),
            draft.secret,
            draft.write_id,
            int(draft.persistent),
            draft.agent,
            draft.address,
            *_pairs(draft.fields),
        ]
        await self._run("session_create", draft.handle, args, timeout=timeout)

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
        args: list[str | bytes | int] = [
            handle[3:],
            self._publish,
            self._names.sessions_channel(handle[:2]),
            message,
            write_id,
            expected or "",
            len(removed),
            *[f".{key}" for key in removed],
            *_pairs(changed),
        ]
        return _OUTCOMES[await self._run("session_write", handle, args, timeout=timeout)]

    async def touch(self, handle: Handle, *, timeout: float) -> bool:
        """See ``SessionStore.touch``."""
        return bool(await self._run("session_touch", handle, [handle[3:]], timeout=timeout))

    async def rotate(
        self, handle: Handle, *, secret: bytes, current: bytes, grace: float, write_id: str, message: bytes, timeout: float
    ) -> WriteOutcome:
        """See ``SessionStore.rotate``."""
        channel = self._names.sessions_channel(handle[:2])
        args = [self._publish, channel, message, write_id, secret, current, _ms(grace)]
        return _OUTCOMES[await self._run("session_rotate", handle, args, timeout=timeout)]

    async def end(self, handle: Handle, *, message: bytes, timeout: float) -> Ending:
        """See ``SessionStore.end``."""
        channel = self._names.sessions_channel(handle[:2])
        args = [handle[3:], self._publish, channel, message, self._registry()]
        ended, nodes = await self._run("session_end", handle, args, timeout=timeout)
        return Ending(sessions=ended, nodes=await self._nodes(nodes, timeout))

    async def devices(self, user: UserId, *, timeout: float) -> Sequence[Device]:
        """See ``SessionStore.devices``."""
        bucket = f"{bucket_of(user):02x}"
        keys = [self._names.epoch(bucket, user), self._names.index(bucket, user)]
        _, rows = await self._topology.run(
            load("session_devices"), keys, [self._names.bucket(bucket)], timeout=timeout
        )
        found = [
            Device(
                handle=Handle(f"{bucket}.{token.decode()}"),
                created_at=int(created) / 1000,
                seen_at=int(seen) / 1000,
                expires_in=pttl / 1000,
                agent=agent.decode("utf-8", "replace"),
                address=address.decode("utf-8", "replace"),
            )
            for token, pttl, created, seen, agent, address in rows
        ]
        return sorted(found, key=lambda device: device.seen_at, reverse=True)

    async def end_all(
        self, user: UserId, *, keep: Handle | None, epoch: str, message: bytes, timeout: float
    ) -> Ending:
        """See ``SessionStore.end_all``."""
        bucket = f"{bucket_of(user):02x}"
        keys = [self._names.epoch(bucket, user), self._names.index(bucket, user)]
        args: list[str | bytes | int] = [
            self._names.bucket(bucket),
            keep[3:] if keep else "",
            self._publish,
            self._names.sessions_channel(bucket),
            message,
            epoch,
            self._registry(),
        ]
        ended, nodes = await self._topology.run(load("session_end_all"), keys, args, timeout=timeout)
        return Ending(sessions=ended, nodes=await self._nodes(nodes, timeout))

    async def lock(self, handle: Handle, *, token: str, hold: float, timeout: float) -> bool:
        """See ``SessionStore.lock`` (SET NX PX, released by compare and delete: the pattern of the Redis documentation)."""
        key = self._names.lock(handle)
        reply = await self._topology.call(key, "SET", key, token, "NX", "PX", _ms(hold), timeout=timeout)
        return reply is not None

    async def unlock(self, handle: Handle, *, token: str, timeout: float) -> bool:
        """See ``SessionStore.unlock``."""
        key = self._names.lock(handle)
        return bool(await self._topology.run(load("unlock"), [key], [token], timeout=timeout))

    def _run(self, name: str, handle: Handle, args: list[Any], *, timeout: float) -> Any:
        prefix = self._names.bucket(handle[:2])
        return self._topology.run(load(name), [self._names.session(handle)], [prefix, *args], timeout=timeout)

    def _registry(self) -> str:
        # On a Cluster the registry is in another slot, and a script must not touch it.
        return "" if self._topology.sharded else self._names.nodes()

    async def _nodes(self, nodes: Sequence[bytes], timeout: float) -> list[str]:
        if self._topology.sharded:
            nodes = await self._topology.call(self._names.nodes(), "HKEYS", self._names.nodes(), timeout=timeout)
        return [node.decode() for node in nodes]


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _pairs(fields: Mapping[str, bytes]) -> list[str | bytes]:
    return [item for key, value in fields.items() for item in (f".{key}", value)]


def _record(handle: Handle, now: int, pttl: int, items: Sequence[bytes]) -> Record:
    meta: dict[bytes, bytes] = {}
    fields: dict[str, bytes] = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        if key[:1] == b".":
            fields[key[1:].decode()] = value
        else:
            meta[key] = value
    absolute_in = (int(meta[b"@abs"]) - now) / 1000
    previous_for = (int(meta[b"@prev_until"]) - now) / 1000 if b"@prev_until" in meta else 0.0
    user = meta.get(b"@user")
    return Record(
        handle=handle,
        secret=meta[b"@secret"],
        previous=meta[b"@prev"] if previous_for > 0 else None,
        previous_for=max(0.0, previous_for),
        user=None if user is None else UserId(user.decode()),
        version=int(meta[b"@ver"]),
        write_id=meta[b"@write"].decode(),
        created_at=int(meta[b"@created"]) / 1000,
        # A record without TTL was tampered with: then the absolute timeout still holds.
        expires_in=min(pttl / 1000, absolute_in) if pttl >= 0 else absolute_in,
        absolute_in=absolute_in,
        idle=int(meta[b"@idle"]) / 1000,
        persistent=meta.get(b"@persistent") == b"1",
        fields=fields,
    )
