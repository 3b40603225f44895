"""Where the keys are, and how to reach them."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from redis.exceptions import NoScriptError, RedisError

from asgi_cluster.backends.redis.address import Address
from asgi_cluster.backends.redis.client import PrimaryClient
from asgi_cluster.backends.redis.errors import first_word, unavailable
from asgi_cluster.backends.redis.lifetime import background
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.scripts import Script
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.tasks import Failing

__all__ = ["OnePrimary", "Topology", "single_server"]

logger = logging.getLogger("asgi_cluster.redis")

_RETRY_PAUSE = 0.02


class Topology(Protocol):
    """One or more primaries that together hold all keys."""

    sharded: bool
    """Redis Cluster: channels belong to slots, publish with SPUBLISH."""

    def opened(self, failing: Failing | None = None) -> AbstractAsyncContextManager[None]:
        """Connected while entered.

        Raises ``StoreUnavailable`` on entering: cannot be reached, refuses the login, is too old.
        """
        ...

    async def call(self, key: str, *args: str | bytes | int, timeout: float) -> Any:
        """One command, to the primary that has ``key``. Replies are bytes, int, list, dict or ``None``.

        Only what provably did not run is tried again, while there is time.

        Raises:
            StoreUnavailable: no reply within ``timeout`` seconds, or the server refused.
        """
        ...

    async def run(
        self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int], *, timeout: float
    ) -> Any:
        """A script, all of whose keys share a slot. As ``call``."""
        ...

    def post(self, key: str, *args: str | bytes | int) -> bool:
        """One command whose reply is not needed, to the primary that has ``key``; False when it could not be
        sent.
        """
        ...

    def run_id(self, key: str) -> str:
        """The run id of the server that has ``key``: another one has not necessarily the same last writes.

        Raises:
            StoreUnavailable: not connected.
        """
        ...

    @property
    def answering(self) -> bool:
        """Whether every primary is connected and has answered lately."""
        ...

    # For the subscribers

    def primaries(self) -> Sequence[Primary]:
        """All of them, as of the last look."""
        ...

    def home(self, key: str) -> Primary | None:
        """The primary that has ``key`` (or a channel), as of the last look; ``None`` while none has it."""
        ...

    def tag_at(self, primary: Primary) -> str | None:
        """A hash tag whose keys are on ``primary``; ``None`` when it has no slots."""
        ...

    def watch(self, changed: Callable[[], None] | None) -> None:
        """``changed`` is called whenever homes may have changed."""
        ...

    def refresh_soon(self) -> None:
        """A command was redirected or a connection cut: look again where everything is, soon. Never waits."""
        ...

    def reconnect_now(self, primary: Primary) -> None:
        """A subscriber has reached ``primary`` again: its client need not wait before it connects."""
        ...


class Routed(ABC):
    """What topologies share: scripts by their hash."""

    @abstractmethod
    async def call(self, key: str, *args: str | bytes | int, timeout: float) -> Any:
        """See ``Topology.call``."""

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
        """See ``Topology.watch``: homes never change."""

    def refresh_soon(self) -> None:
        """See ``Topology.refresh_soon``: every new connection looks anew anyhow."""

    def reconnect_now(self, primary: Primary) -> None:
        if self._commands is not None:
            self._commands.reconnect_now()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.primary.name}>"


def single_server(address: Address) -> OnePrimary:
    """One server without failover."""
    return OnePrimary(Primary(address.dial, lambda: address.name))
