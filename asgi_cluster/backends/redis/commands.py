"""The command link of one server: kept up in the background, waited for only as long as a caller may wait."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from redis.exceptions import RedisError

from asgi_cluster.backends.redis.errors import NOT_EXECUTED, LinkBroken, first_word, reason_of, unavailable
from asgi_cluster.backends.redis.link import Link
from asgi_cluster.exceptions import StoreUnavailable

__all__ = ["CommandLink"]

logger = logging.getLogger("asgi_cluster.redis")

_CONNECT_TIMEOUT = 1.0
_PROBE_EVERY = 0.5
_SILENT_AFTER = 1.0
_GIVE_UP_AFTER = 2.0
_LONGEST_PAUSE = 0.5


class CommandLink:
    """Commands to one server.

    A breaker spares callers the wait: when the server has not answered for a second, or cannot be reached for as long, calls fail at
    once until a probe of ours is answered.
    """

    def __init__(self, make: Callable[[], Link], name: str) -> None:
        self._make = make
        self._name = name
        self._link: Link | None = None
        self._changed = asyncio.Event()
        self._down_since: float | None = None
        self._reason = "not started"
        self._silent = False
        self._next: Link | None = None
        self.run_id = ""
        self.reconnects = -1

    async def open_once(self) -> None:
        """The first connection, for ``run`` to take over: an error here is the caller's to see. Raises ``StoreUnavailable``."""
        link = self._make()
        try:
            await link.open(_CONNECT_TIMEOUT)
        except LinkBroken as error:
            raise StoreUnavailable(f"{self._name}: {error.reason}") from error
        self._next = link

    async def run(self, started: asyncio.Future[None]) -> None:
        """Keep the link up until cancelled; full-jitter backoff between tries. ``started`` gets the outcome of the first."""
        pause = 0.05
        while True:
            link, self._next = self._next, None
            if link is None:
                link = self._make()
                try:
                    await link.open(_CONNECT_TIMEOUT)
                except LinkBroken as error:
                    self._went_down(error.reason)
                    await asyncio.sleep(random.uniform(0, pause))
                    pause = min(pause * 2, _LONGEST_PAUSE)
                    continue
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(link.run(), name="asgi-cluster command link")
                    await self._introduce(link)
                    pause = 0.05
                    if not started.done():
                        started.set_result(None)
                    await self._probe(link)
            except* (LinkBroken, StoreUnavailable) as group:
                cause = _first(group)
                self._went_down(reason_of(cause))
                if not started.done():
                    started.set_exception(
                        cause if isinstance(cause, StoreUnavailable) else StoreUnavailable(f"{self._name}: {self._reason}")
                    )
                logger.warning("lost the connection to %s: %s", self._name, self._reason)
            finally:
                self._link = None
            await asyncio.sleep(random.uniform(0, pause))

    async def _introduce(self, link: Link) -> None:
        # Another run id means another history of writes: whoever hands out numbers has to know it before the first command.
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                info = await link.send("INFO", "server")
        except TimeoutError:
            raise LinkBroken("no answer to INFO", sent=False) from None
        except RedisError as error:
            raise unavailable(error, sent=False) from error
        self.run_id = check_server(self._name, info)
        self._link = link
        self._down_since = None
        self._silent = False
        self.reconnects += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def _went_down(self, reason: str) -> None:
        self._reason = reason
        self._link = None
        if self._down_since is None:
            self._down_since = asyncio.get_running_loop().time()

    async def _probe(self, link: Link) -> None:
        # One PING at a time tells a stopped server from an idle one, so that requests need not find out by waiting.
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_PROBE_EVERY)
            answer = link.send("PING")
            asked = loop.time()
            while not answer.done():
                silent_for = loop.time() - asked
                self._silent = silent_for >= _SILENT_AFTER
                if silent_for >= _GIVE_UP_AFTER:
                    raise LinkBroken(f"no answer for {_GIVE_UP_AFTER:g} s")
                await asyncio.wait([answer], timeout=0.1)
            answer.exception()
            self._silent = False

    @property
    def answering(self) -> bool:
        """Whether the server is connected and has answered lately."""
        return self._link is not None and not self._silent

    async def call(self, *args: str | bytes | int, timeout: float) -> Any:
        """One command.

        Raises:
            StoreUnavailable: no reply within ``timeout`` seconds, or the server refused.
            RedisError: an error reply which proves that it did nothing (``errors.NOT_EXECUTED``).
        """
        deadline = asyncio.get_running_loop().time() + timeout
        sent = False
        try:
            async with asyncio.timeout_at(deadline):
                link = self._link or await self._reconnected()
                if self._silent:
                    raise LinkBroken("the server does not answer", sent=False)
                future = link.send(*args)
                sent = True
                return await future
        except TimeoutError as error:
            raise StoreUnavailable(f"{self._name}: no answer within {timeout:.2f} s", outcome_unknown=sent) from error
        except LinkBroken as error:
            reason = f"{self._name}: {error.reason}"
            raise StoreUnavailable(reason, outcome_unknown=sent and error.sent) from error
        except RedisError as error:
            if first_word(error) in NOT_EXECUTED:
                raise
            raise unavailable(error, sent=sent) from error

    def post(self, *args: str | bytes | int) -> bool:
        """One command whose reply nobody wants; False when it could not be sent."""
        if self._link is None:
            return False
        try:
            self._link.post(*args)
        except LinkBroken:
            return False
        return True

    async def _reconnected(self) -> Link:
        while self._link is None:
            down_since = self._down_since
            if down_since is not None and asyncio.get_running_loop().time() - down_since > _SILENT_AFTER:
                raise LinkBroken(self._reason, sent=False)
            await self._changed.wait()
        return self._link

    def __repr__(self) -> str:
        state = "up" if self.answering else "silent" if self._link else f"down ({self._reason})"
        return f"<CommandLink {self._name} {state}>"


def check_server(name: str, info: bytes) -> str:
    """The server's run id, from ``INFO server``.

    Raises:
        StoreUnavailable: it is older than Redis 6.2.
    """
    facts = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
    version = facts.get("redis_version", "0")
    if [int(part) for part in version.split(".")[:2] if part.isdigit()] < [6, 2]:
        raise StoreUnavailable(f"{name}: the server is too old: Redis 6.2 or newer is needed, this is {version}")
    return facts.get("run_id", "")


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
