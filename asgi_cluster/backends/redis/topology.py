"""Where the keys live, and how to reach them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from redis.exceptions import NoScriptError, RedisError

from asgi_cluster.backends.redis.commands import CommandLink
from asgi_cluster.backends.redis.errors import first_word, unavailable
from asgi_cluster.backends.redis.link import Link, OnPush
from asgi_cluster.backends.redis.scripts import Script
from asgi_cluster.backends.redis.urls import Address
from asgi_cluster.exceptions import StoreUnavailable

__all__ = ["SingleServer", "Topology"]

logger = logging.getLogger("asgi_cluster.redis")

_RETRY_PAUSE = 0.05


class Topology(Protocol):
    """One or more servers that together hold all keys."""

    sharded: bool
    """Redis Cluster: channels live in slots, publish with SPUBLISH."""

    def opened(self) -> Any:
        """An async context manager: connected while it is entered. Raises ``StoreUnavailable`` on entering."""
        ...

    async def call(self, key: str, *args: str | bytes | int, timeout: float) -> Any:
        """One command, to the primary that has ``key``. Replies are bytes, int, list, dict or ``None``.

        Raises:
            StoreUnavailable: no reply within ``timeout`` seconds, or the server refused.
        """
        ...

    async def run(
        self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int], *, timeout: float
    ) -> Any:
        """A script, all of whose keys share a slot. Raises as ``call``."""
        ...

    def post(self, key: str, *args: str | bytes | int) -> bool:
        """One command whose reply nobody wants, to the primary that has ``key``; False when it could not be sent."""
        ...

    def run_id(self, key: str) -> str:
        """The run id of the server that has ``key``: another one has not necessarily the same last writes."""
        ...

    @property
    def answering(self) -> bool:
        """Whether every primary is connected and has answered lately."""
        ...


class SingleServer:
    """One server without failover."""

    sharded = False

    def __init__(self, address: Address) -> None:
        self.address = address
        self._commands: CommandLink | None = None

    def subscriber_link(self, on_push: OnPush) -> Link:
        """A link for the subscriber, not open yet."""
        return Link(self.address.connection(), on_push)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Connected while entered. Raises ``StoreUnavailable`` when it cannot be reached, refuses us, or is too old."""
        commands = CommandLink(lambda: Link(self.address.connection()), self.address.name)
        await commands.open_once()
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(commands.run(started), name="asgi-cluster commands")
            try:
                await started
                self._commands = commands
                yield
            finally:
                self._commands = None
                keeper.cancel()

    def _link(self) -> CommandLink:
        if self._commands is None:
            raise StoreUnavailable("not connected")
        return self._commands

    async def call(self, key: str, *args: str | bytes | int, timeout: float) -> Any:
        """See ``Topology.call``. What provably did not run is tried again while there is time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            try:
                return await self._link().call(*args, timeout=deadline - loop.time())
            except NoScriptError:
                raise
            except RedisError as error:
                if loop.time() + _RETRY_PAUSE >= deadline:
                    raise unavailable(error, sent=False) from error
                logger.debug("%s answered %s: trying again", self.address.name, first_word(error))
                await asyncio.sleep(_RETRY_PAUSE)

    async def run(
        self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int], *, timeout: float
    ) -> Any:
        """See ``Topology.run``."""
        try:
            return await self.call(keys[0], "EVALSHA", script.sha, len(keys), *keys, *args, timeout=timeout)
        except NoScriptError:
            # The server has not seen it since it started. EVAL also loads it.
            return await self.call(keys[0], "EVAL", script.source, len(keys), *keys, *args, timeout=timeout)

    def post(self, key: str, *args: str | bytes | int) -> bool:
        """See ``Topology.post``."""
        return self._commands is not None and self._commands.post(*args)

    def run_id(self, key: str) -> str:
        """See ``Topology.run_id``."""
        return self._link().run_id

    @property
    def answering(self) -> bool:
        """See ``Topology.answering``."""
        return self._commands is not None and self._commands.answering

    def __repr__(self) -> str:
        return f"<SingleServer {self.address.name}>"
