"""Sessions in Redis: one hash per session, one script per operation, one round trip."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.records import (
    decode_fields,
    decode_logout,
    decode_record,
    field_pairs,
    milliseconds,
)
from asgi_cluster.backends.redis.scripts import load
from asgi_cluster.backends.redis.topology import Commands
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, UserId, bucket_of
from asgi_cluster.sessions.corrupt import CorruptRecords
from asgi_cluster.sessions.store import (
    LOGOUT_KEPT,
    UNKNOWN_NODES,
    Change,
    Device,
    EndResult,
    NewSession,
    Record,
    UserLogout,
    WriteOutcome,
)

__all__ = ["RedisSessionStore"]

logger = logging.getLogger("asgi_cluster.redis")

T = TypeVar("T")

_CORRUPT = -2
_UNSURE = -3
_OUTCOMES: Mapping[int, WriteOutcome] = {
    1: "written",
    2: "unchanged",
    3: "ended",
    0: "gone",
    -1: "conflict",
}

_WAIT_FOR = 20
"""Milliseconds. ``WAIT`` holds up everything behind it on its connection, and an idle server looks at its
timeout only ten times a second. Replicas that are well answer in one or two; more is not worth it."""


class RedisSessionStore:
    """``sessions.store.SessionStore`` on Redis ≥ 6.2 or Valkey.

    Meta fields of a session's hash start with ``@``, the application's with ``.``. Times are milliseconds of
    the server's clock. ``wait_replicas`` above 0 finds out, after a logout, how many replicas have it
    (``EndResult.replicas``).
    """

    def __init__(self, topology: Commands, names: Names, *, wait_replicas: int = 0) -> None:
        self._topology = topology
        self._names = names
        self._wait_replicas = wait_replicas
        self._publish = "SPUBLISH" if topology.sharded else "PUBLISH"
        self._corrupt = CorruptRecords()

    def run_id(self, bucket: int) -> str | None:
        try:
            return self._topology.run_id(self._names.bucket(f"{bucket:02x}")) or None
        except StoreUnavailable:
            return None

    def read(self, handle: Handle, *, timeout: float) -> Coroutine[Any, Any, Record | None]:
        """See ``RecordStore.read``. A record that cannot be understood is logged, counted and treated as
        missing.
        """
        return self._run("session_read", handle, [], self._record, timeout=timeout)

    def _record(self, handle: Handle, reply: Any) -> Record | None:
        if reply is None:
            return None
        if reply != _CORRUPT:
            try:
                return decode_record(handle, *reply)
            except (KeyError, ValueError, OverflowError):
                # Of the decoder: a field is missing, no number, or no UTF-8.
                pass
        self._corrupted(handle)
        return None

    @property
    def corrupt(self) -> int:
        """How often a record could not be understood."""
        return self._corrupt.count

    def _corrupted(self, handle: Handle) -> None:
        self._corrupt.found(handle, "has a corrupt record")

    async def create(self, new: NewSession, *, timeout: float) -> float:
        args: list[str | bytes | int] = [
            new.handle[3:],
            new.user or "",
            new.epoch,
            milliseconds(new.idle),
            milliseconds(new.absolute),
            new.secret,
            new.write_id,
            int(new.persistent),
            new.agent,
            new.address,
            *field_pairs(new.fields),
        ]
        keys = [self._names.session(new.handle)]
        if new.user is not None:
            keys += self._of_user(new.user)[1]
        args.insert(0, self._names.bucket(new.handle[:2]))
        created = await self._topology.run(load("session_create"), keys, args, timeout=timeout)
        return int(created) / 1000

    def write(
        self,
        handle: Handle,
        change: Change,
        *,
        message: bytes,
        ended: bytes = b"",
        timeout: float,
    ) -> Coroutine[Any, Any, WriteOutcome]:
        args: list[str | bytes | int] = [
            handle[3:],
            self._publish,
            self._names.sessions_channel(handle[:2]),
            message,
            ended,
            change.write_id,
            change.expected or "",
            len(change.removed),
            *[f".{key}" for key in change.removed],
            *field_pairs(change.changed),
        ]
        return self._run("session_write", handle, args, self._outcome, timeout=timeout)

    async def touch(self, handle: Handle, *, timeout: float) -> bool:
        args = [handle[3:]]
        return await self._run("session_touch", handle, args, self._outcome, timeout=timeout) == "written"

    def rotate(
        self,
        handle: Handle,
        *,
        secret: bytes,
        current: bytes,
        grace: float,
        write_id: str,
        message: bytes,
        timeout: float,
    ) -> Coroutine[Any, Any, WriteOutcome]:
        channel = self._names.sessions_channel(handle[:2])
        args = [self._publish, channel, message, write_id, secret, current, milliseconds(grace)]
        return self._run("session_rotate", handle, args, self._outcome, timeout=timeout)

    def _outcome(self, handle: Handle, reply: Any) -> WriteOutcome:
        if reply == _CORRUPT:
            self._corrupted(handle)
            return "gone"
        return _OUTCOMES[reply]

    async def end(
        self, handle: Handle, *, message: bytes, expected: str | None = None, timeout: float
    ) -> EndResult:
        channel = self._names.sessions_channel(handle[:2])
        args = [handle[3:], self._publish, channel, message, self._registry(), expected or ""]
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        result = await self._run("session_end", handle, args, self._end_result, timeout=timeout)
        if result.overtaken:
            return result
        return await self._after_replication(self._names.session(handle), result, deadline - clock())

    def _end_result(self, handle: Handle, reply: Any) -> EndResult:
        ended, nodes, *found = reply
        if not found:
            return EndResult(sessions=ended, nodes=[_text(node) for node in nodes])
        write_id, lengths, contents = found
        fields: Mapping[str, bytes] = {}
        try:
            fields = decode_fields(lengths, contents)[1]
        except ValueError:  # of the decoder: no UTF-8
            self._corrupted(handle)
        return EndResult(sessions=0, nodes=(), overtaken=_text(write_id), fields=fields)

    async def devices(self, user: UserId, *, timeout: float) -> Sequence[Device]:
        bucket, keys = self._of_user(user)
        rows = await self._topology.run(
            load("session_devices"), keys, [self._names.bucket(bucket)], timeout=timeout
        )
        found = [
            Device(
                handle=Handle(f"{bucket}.{_text(token)}"),
                created_at=int(created) / 1000,
                seen_at=int(seen) / 1000,
                expires_in=ttl / 1000,
                agent=_text(agent),
                address=_text(address),
            )
            for token, ttl, created, seen, agent, address in rows
        ]
        return sorted(found, key=lambda device: device.seen_at, reverse=True)

    async def end_all(
        self, user: UserId, *, keep: Handle | None, epoch: str, message: bytes, timeout: float
    ) -> EndResult:
        bucket, keys = self._of_user(user)
        args: list[str | bytes | int] = [
            self._names.bucket(bucket),
            user,
            # A session in another bucket is not this user's: nothing to keep.
            keep[3:] if keep and keep[:2] == bucket else "",
            self._publish,
            self._names.sessions_channel(bucket),
            message,
            epoch,
            self._registry(),
            keep or "",
            milliseconds(LOGOUT_KEPT),
        ]
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        reply = await self._topology.run(load("session_end_all"), keys, args, timeout=timeout)
        tokens, nodes = reply
        result = EndResult(
            sessions=len(tokens),
            nodes=[_text(node) for node in nodes],
            handles=[Handle(f"{bucket}.{_text(token)}") for token in tokens],
        )
        return await self._after_replication(keys[0], result, deadline - clock())

    async def logouts(self, users: Sequence[UserId], *, timeout: float) -> Mapping[UserId, UserLogout]:
        """See ``UserStore.logouts``. On a Cluster one script for each user: those of several do not share
        a slot.
        """
        script = load("user_logouts")
        parts = [[user] for user in users] if self._topology.sharded else [users]
        replies = await asyncio.gather(
            *(
                self._topology.run(script, [self._of_user(user)[1][0] for user in part], [], timeout=timeout)
                for part in parts
            )
        )
        found: dict[UserId, UserLogout] = {}
        for part, (now, *epochs) in zip(parts, replies, strict=True):
            for user, epoch in zip(part, epochs, strict=True):
                logout = None if epoch is None else decode_logout(epoch, now)
                if logout is not None:
                    found[user] = logout
        return found

    async def lock(self, handle: Handle, *, token: str, hold: float, timeout: float) -> bool:
        """See ``LockStore.lock`` (SET NX PX, given back by compare and delete: the pattern of the Redis
        manual).
        """
        key = self._names.lock(handle)
        reply = await self._topology.call(
            key, "SET", key, token, "NX", "PX", milliseconds(hold), timeout=timeout
        )
        return reply is not None

    async def unlock(self, handle: Handle, *, token: str, timeout: float) -> bool:
        key = self._names.lock(handle)
        return bool(await self._topology.run(load("unlock"), [key], [token], timeout=timeout))

    async def _run(
        self,
        name: str,
        handle: Handle,
        args: list[Any],
        decode: Callable[[Handle, Any], T],
        *,
        timeout: float,
    ) -> T:
        """Run a script on one session. Decoded here, so that a write has one coroutine less to pass."""
        script, bucket = load(name), handle[:2]
        args = [self._names.bucket(bucket), *args]
        keys = [self._names.session(handle)]
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        reply = await self._topology.run(script, keys, args, timeout=timeout)
        if isinstance(reply, list) and reply[0] == _UNSURE:
            # The user's epoch is missing: revoked, or in a slot that is moving. With the epoch among the keys
            # the server decides: in the second case it answers TRYAGAIN, and the topology tries again.
            # A name that is no UTF-8 is no user's: there is no such epoch, whatever name was given.
            keys.append(self._names.epoch(bucket, _text(reply[1])))
            reply = await self._topology.run(script, keys, args, timeout=deadline - clock())
        return decode(handle, reply)

    def _of_user(self, user: UserId) -> tuple[str, list[str]]:
        bucket = f"{bucket_of(user):02x}"
        return bucket, [self._names.epoch(bucket, user), self._names.index(bucket, user)]

    def _registry(self) -> str:
        # On a Cluster the registry is in another slot, and a script must not touch it.
        return "" if self._topology.sharded else self._names.nodes()

    async def _after_replication(self, key: str, result: EndResult, timeout: float) -> EndResult:
        """With what the script could not find out: the nodes of a Redis Cluster, and the replicas that have
        the change.
        """
        # The change is committed: whatever fails from here on is reported, and does not make the logout fail.
        nodes, replicas = result.nodes, None
        if self._topology.sharded:
            registry = self._names.nodes()
            try:
                found = await self._topology.call(registry, "HKEYS", registry, timeout=max(0.0, timeout))
                nodes = [_text(node) for node in found]
            except StoreUnavailable as error:
                logger.warning(
                    "a session was ended, but the registry of nodes could not be read: %s", error.reason
                )
                nodes = [UNKNOWN_NODES]
        if self._wait_replicas:
            replicas = await self._replicated(key, timeout)
        return msgspec.structs.replace(result, nodes=nodes, replicas=replicas)

    async def _replicated(self, key: str, timeout: float) -> int:
        try:
            return int(
                await self._topology.call(
                    key, "WAIT", self._wait_replicas, _WAIT_FOR, timeout=max(0.0, timeout)
                )
            )
        except StoreUnavailable as error:
            logger.debug("WAIT failed, so that no replica counts: %s", error)
            return 0


def _text(data: bytes) -> str:
    # What was tampered with must not fail a reply in which the rest is right.
    return data.decode("utf-8", "replace")
