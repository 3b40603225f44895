"""Where the keys are, and how to reach them."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.exceptions import NoScriptError, RedisError

from asgi_cluster.backends.redis.address import Address
from asgi_cluster.backends.redis.client import PrimaryClient
from asgi_cluster.backends.redis.errors import first_word, unavailable
from asgi_cluster.backends.redis.lifetime import background
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.scripts import Script
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.tasks import Failing

__all__ = ["OnePrimary", "Routed", "single_server"]

logger = logging.getLogger("asgi_cluster.redis")

_RETRY_PAUSE = 0.02


class Routed(ABC):
    """What topologies share: scripts by their hash."""

    @abstractmethod
    async def call(self, key: str, *args: str | bytes | int, timeout: float) -> Any:
        """See ``Commands.call``."""

    async def run(
        self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int], *, timeout: float
    ) -> Any:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            return await self.call(keys[0], "EVALSHA", script.sha, len(keys), *keys, *args, timeout=timeout)
        except NoScriptError:
            # The server has not seen it since it started. EVAL also loads it.
            remaining = deadline - loop.time()
            return await self.call(keys[0], "EVAL", script.source, len(keys), *keys, *args, timeout=remaining)


class OnePrimary(Routed):
    """All keys on one primary: a single server, or whatever the sentinels say it is."""

    sharded = False

    def __init__(self, primary: Primary) -> None:
        self.primary = primary
        self._commands: PrimaryClient | None = None

    @asynccontextmanager
    async def opened(self, failing: Failing | None = None) -> AsyncIterator[None]:
        commands = PrimaryClient(self.primary)
        async with background(failing) as tasks:
            tasks.keep(commands.reconnecting.run, name="commands")
            await commands.reconnecting.started
            self._commands = commands
            try:
                yield
            finally:
                self._commands = None

    def _client(self) -> PrimaryClient:
        if self._commands is None:
            raise StoreUnavailable("not connected")
        return self._commands

    async def call(self, key: str, *args: str | bytes | int, timeout: float) -> Any:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            try:
                commands = self._client()
                return await commands.call(*args, timeout=deadline - loop.time())
            except NoScriptError:
                raise
            except RedisError as error:
                if first_word(error) == "READONLY":
                    # It was demoted: the primary is another server than the one at the other end of this
                    # connection.
                    commands.drop("the server is a replica now")
                if loop.time() + _RETRY_PAUSE >= deadline:
                    raise unavailable(error, sent=False) from error
                logger.debug("%s answered %s: trying again", self.primary.name, first_word(error))
                await asyncio.sleep(_RETRY_PAUSE)

    def post(self, key: str, *args: str | bytes | int) -> bool:
        return self._commands is not None and self._commands.post(*args)

    def run_id(self, key: str) -> str:
        return self._client().run_id

    @property
    def answering(self) -> bool:
        return self._commands is not None and self._commands.answering

    def primaries(self) -> Sequence[Primary]:
        return [self.primary]

    def home(self, key: str) -> Primary:
        return self.primary

    def tag_at(self, primary: Primary) -> str:
        return "nodes"

    def watch(self, changed: Callable[[], None] | None) -> None:
        """See ``Primaries.watch``: homes never change."""

    def refresh_soon(self) -> None:
        """See ``Primaries.refresh_soon``: every new connection looks anew anyhow."""

    def reconnect_now(self, primary: Primary) -> None:
        if self._commands is not None:
            self._commands.reconnect_now()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.primary.name}>"


def single_server(address: Address) -> OnePrimary:
    """One server without failover."""
    return OnePrimary(Primary(address.dial, lambda: address.name))
