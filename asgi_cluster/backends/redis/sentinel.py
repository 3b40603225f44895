"""A primary that the sentinels name: before every connection the node reads its address from them, and they
publish a change.

The node subscribes to ``+switch-master`` at every sentinel; a retry at the old address would notice the
change late.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakKeyDictionary

from redis.exceptions import RedisError

from asgi_cluster.backends.redis.address import Address, HostPort
from asgi_cluster.backends.redis.connection import MultiplexedConnection, OnPush
from asgi_cluster.backends.redis.errors import ConnectionBroken, is_timeout, reason_of
from asgi_cluster.backends.redis.lifetime import background
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.reconnect import ReconnectLoop
from asgi_cluster.backends.redis.single import OnePrimary
from asgi_cluster.backends.redis.urls import Target
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.tasks import Failing

__all__ = ["SentinelTopology"]

logger = logging.getLogger("asgi_cluster.redis")

_SWITCH = "+switch-master"
_ANSWER = 0.3
_PATIENCE = 1.0
_LONGEST_PAUSE = 1.0
_PROBE_EVERY = 1.0


class _Sentinel:
    """One sentinel, and the subscription to it as long as it answers."""

    def __init__(self, address: Address, topology: SentinelTopology) -> None:
        self.address = address
        self._topology = topology
        self._connection: MultiplexedConnection | None = None
        self.reason = "not connected yet"
        self.late = True
        """Whether ``reason`` is that there was no answer in time, or none yet."""
        self.reconnecting = ReconnectLoop(
            lambda: address.dial(self._pushed), self._use, self._lost, longest_pause=_LONGEST_PAUSE
        )
        """To run in a task."""

    async def _use(self, connection: MultiplexedConnection) -> None:
        async with asyncio.timeout(_PATIENCE):
            refused = await connection.subscribe("SUBSCRIBE", [[_SWITCH]])
        for error in refused.values():
            raise error
        self._connection = connection
        self.reconnecting.established()
        self._topology.sentinels_changed()
        await self._topology.compare()
        while True:  # a sentinel that is stopped is not one to wait for
            await asyncio.sleep(_PROBE_EVERY)
            async with asyncio.timeout(_PATIENCE):
                await connection.send("PING")

    def _lost(self, error: Exception | None) -> None:
        self._connection = None
        if error is not None:
            self._failed(error)
        self._topology.sentinels_changed()

    def _pushed(self, kind: bytes, channel: bytes, payload: Any) -> None:
        if kind == b"message":
            service, _, _, host, port = payload.decode().split(" ")
            self._topology.switched(service, (host, int(port)))

    async def primary_of(self, service: str) -> tuple[int, HostPort] | None:
        """Its config epoch for the service, and where the primary is; ``None`` when it has no such service or
        does not answer.
        """
        if self._connection is None:
            return None
        try:
            async with asyncio.timeout(_ANSWER):
                address = self._connection.send("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
                details = self._connection.send("SENTINEL", "MASTER", service)
                place = await address
                if place is None:
                    self.reason, self.late = f"has no service {service!r}", False
                    return None
                return int((await details)[b"config-epoch"]), (place[0].decode(), int(place[1]))
        except (RedisError, ConnectionBroken, TimeoutError) as error:
            self._failed(error)
            return None

    def _failed(self, error: Exception) -> None:
        self.reason, self.late = reason_of(error), is_timeout(error)


class SentinelTopology(OnePrimary):
    """All keys on the primary of one Sentinel service."""

    def __init__(self, target: Target) -> None:
        self._address = target.primary
        self._service = target.service
        self._addresses = target.addresses
        self._sentinels: list[_Sentinel] = []
        self._changed = asyncio.Event()
        self._place: HostPort | None = None
        self._epoch = -1
        self._places: WeakKeyDictionary[MultiplexedConnection, HostPort] = WeakKeyDictionary()
        self._dialing: dict[asyncio.Timeout, HostPort] = {}
        super().__init__(Primary(self._dial, lambda: self._name))

    @property
    def _name(self) -> str:
        return f"{self._service} at {self._place[0]}:{self._place[1]}" if self._place else self._service

    @asynccontextmanager
    async def opened(self, failing: Failing | None = None) -> AsyncIterator[None]:
        async with background(failing) as tasks:
            self._sentinels = [_Sentinel(address, self) for address in self._addresses]
            for sentinel in self._sentinels:
                tasks.keep(sentinel.reconnecting.run, name="sentinel")
            async with super().opened(failing):
                await self._warn()
                yield

    async def _warn(self) -> None:
        try:
            found = await self.call("", "CONFIG", "GET", "min-replicas-to-write", timeout=1.0)
        except StoreUnavailable:
            return  # managed servers keep their configuration to themselves
        if found.get(b"min-replicas-to-write") == b"0":
            logger.warning(
                "min-replicas-to-write is 0: a primary that is cut off goes on taking writes, "
                "and nothing bounds how old a session is that is read there"
            )

    # Locating the primary

    async def _dial(self, on_push: OnPush | None) -> MultiplexedConnection:
        error = ConnectionBroken("no sentinel was tried", sent=False)
        for place in await self._locate():
            dialing = asyncio.timeout(None)  # runs out when the sentinels name another one meanwhile
            self._dialing[dialing] = place
            try:
                async with dialing:
                    connection = await self._address.at(*place).dial(on_push)
            except ConnectionBroken as broken:
                error = broken
            except TimeoutError:
                return await self._dial(on_push)
            else:
                self._place = self._places[connection] = place
                return connection
            finally:
                del self._dialing[dialing]
        raise error

    async def _locate(self) -> list[HostPort]:
        """Where the primary may be, the newest config epoch first."""
        deadline = asyncio.get_running_loop().time() + _PATIENCE
        while True:
            changed = self._changed
            answers = await asyncio.gather(
                *[sentinel.primary_of(self._service) for sentinel in self._sentinels]
            )
            known = sorted(filter(None, answers), reverse=True)
            if known:
                self._epoch = known[0][0]
                return list(dict.fromkeys(place for _, place in known))
            try:
                async with asyncio.timeout_at(deadline):
                    await changed.wait()
            except TimeoutError as error:
                reasons = "; ".join(
                    f"{sentinel.address.name}: {sentinel.reason}" for sentinel in self._sentinels
                )
                # At the start there is patience with those that may only be busy.
                late = error if any(sentinel.late for sentinel in self._sentinels) else None
                raise ConnectionBroken(f"no sentinel names the primary ({reasons})", sent=False) from late

    def sentinels_changed(self) -> None:
        """One of them is connected, or not any more."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def compare(self) -> None:
        """A sentinel is back: there may have been a failover while it was away."""
        answers = await asyncio.gather(*[sentinel.primary_of(self._service) for sentinel in self._sentinels])
        epoch, place = max(filter(None, answers), default=(-1, ("", 0)))
        if self._epoch < epoch and self._place not in (None, place):
            self._epoch = epoch
            self.switched(self._service, place)

    def switched(self, service: str, place: HostPort) -> None:
        """A sentinel says that the primary is there now."""
        if service != self._service:
            return
        old = [connection for connection, known in self._places.items() if known != place and connection.up]
        if old:
            logger.warning("the primary of %s is now %s:%d", service, *place)
        for connection in old:
            connection.abort("the primary has changed")
        for dialing, at in self._dialing.items():
            if at != place:
                self._dialing[dialing] = place  # once: the other sentinels will say the same
                dialing.reschedule(asyncio.get_running_loop().time())
        self.reconnect_now(self.primary)
