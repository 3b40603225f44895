"""The loop that keeps a connection open, with connections that the test breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.exceptions import AuthenticationError

from asgi_cluster.backends.redis import reconnect
from asgi_cluster.backends.redis.errors import ConnectionBroken
from asgi_cluster.backends.redis.reconnect import ReconnectLoop, connected
from asgi_cluster.exceptions import BusUnavailable, StoreUnavailable
from tests.support.waiting import eventually


class Connection:
    """Runs until the test breaks it."""

    def __init__(self) -> None:
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = False

    async def run(self) -> None:
        await self.broken

    async def close(self) -> None:
        self.closed = True

    def breaks(self, error: Exception) -> None:
        self.broken.set_exception(error)


class Server:
    """What ``dial`` reaches: ``fails`` lists the outcomes of the next attempts, ``None`` for a connection."""

    def __init__(
        self, *fails: Exception | None, refused: Callable[[str], Exception] = StoreUnavailable
    ) -> None:
        self.fails = list(fails)
        self.connections: list[Connection] = []
        self.errors: list[Exception | None] = []
        self.established = True
        self.attempts = 0
        self.loop = ReconnectLoop(self.dial, self.use, self.errors.append, refused=refused)

    async def dial(self) -> Any:
        self.attempts += 1
        error = self.fails.pop(0) if self.fails else None
        if error is not None:
            raise error
        self.connections.append(Connection())
        return self.connections[-1]

    async def use(self, connection: Any) -> None:
        if self.established:
            self.loop.established()
        await asyncio.Event().wait()


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.ensure_future(server.loop.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The bounds of the pauses; the pauses themselves are none."""
    bounds: list[float] = []

    def uniform(least: float, most: float) -> float:
        assert least == 0, "full jitter"
        bounds.append(most)
        return 0.0

    monkeypatch.setattr(reconnect.random, "uniform", uniform)  # type: ignore[attr-defined]
    return bounds


BROKEN = ConnectionBroken("cut")


async def test_connection_that_breaks_is_followed_by_another(pauses: list[float]) -> None:
    """It is closed and reported first; the start was a success and stays one."""
    server = Server()
    async with running(server):
        await server.loop.started
        server.connections[0].breaks(BROKEN)
        await eventually(lambda: len(server.connections) == 2)
        assert server.connections[0].closed
        assert server.errors == [BROKEN]
        assert server.loop.started.exception() is None
    assert server.connections[1].closed
    assert server.errors == [BROKEN, None], "without an error when the loop is cancelled"


async def test_pauses_grow_and_an_established_connection_resets_them(pauses: list[float]) -> None:
    """Doubled from 0.05 s with each attempt that fails, half a second at most."""
    server = Server(*[BROKEN] * 6)
    async with running(server):
        await eventually(lambda: server.connections)
        assert pauses == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
        server.connections[0].breaks(BROKEN)
        await eventually(lambda: len(server.connections) == 2)
        assert pauses[6:] == [0.05]


async def test_connection_that_was_of_no_use_does_not_reset_the_pause(pauses: list[float]) -> None:
    """A server that accepts and then refuses is not asked twenty times in a second."""
    server = Server()
    server.established = False
    async with running(server):
        for number in range(3):
            await eventually(lambda: len(server.connections) == number + 1)  # noqa: B023
            server.connections[-1].breaks(BROKEN)
        await eventually(lambda: len(server.connections) == 4)
        assert pauses == [0.05, 0.1, 0.2]


async def test_pause_that_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server can be reached again, as another connection has found."""
    monkeypatch.setattr(reconnect.random, "uniform", lambda least, most: 3600.0)  # type: ignore[attr-defined]
    server = Server(BROKEN)
    async with running(server):
        await eventually(lambda: server.errors)
        server.loop.skip_pause()
        await eventually(lambda: server.connections)


async def test_refusal_at_the_start_is_final(pauses: list[float]) -> None:
    """The caller gets the reason, in the error of its port."""
    server = Server(AuthenticationError("secret"), refused=BusUnavailable)
    async with running(server):
        with pytest.raises(BusUnavailable, match="the server refused the user name or password") as error:
            await server.loop.started
        assert "secret" not in str(error.value)


async def test_server_that_is_late_at_the_start(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be busy: there are more attempts, until patience ends."""
    late = ConnectionBroken("no answer in time")
    late.__cause__ = TimeoutError()
    server = Server(late, TimeoutError())
    async with running(server):
        await server.loop.started
        assert server.attempts == 3
    monkeypatch.setattr(reconnect, "_PATIENCE_AT_START", -1.0)
    server = Server(late)
    async with running(server):
        with pytest.raises(StoreUnavailable, match="no answer in time"):
            await server.loop.started


async def test_refusal_after_the_start_changes_nothing(pauses: list[float]) -> None:
    """The node has started; the loop goes on."""
    server = Server(None, AuthenticationError("x"))
    async with running(server):
        await server.loop.started
        server.connections[0].breaks(BROKEN)
        await eventually(lambda: len(server.connections) == 2)
        server.loop.refuse("late")
        assert server.loop.started.exception() is None


async def test_unexpected_error_ends_the_loop(pauses: list[float]) -> None:
    """It is raised as it is, after the connection was closed and reported."""
    server = Server()
    async with running(server) as task:
        await server.loop.started
        server.connections[0].breaks(KeyError("a bug"))
        await asyncio.wait([task])
        assert isinstance(task.exception(), KeyError)
        assert server.connections[0].closed
        assert [type(error) for error in server.errors] == [KeyError]


@pytest.mark.parametrize("ticks", range(6))
async def test_connection_that_breaks_while_the_loop_is_cancelled(pauses: list[float], ticks: int) -> None:
    """Whichever comes first: the loop ends."""
    server = Server()
    async with running(server) as task:
        await server.loop.started
        server.connections[0].breaks(BROKEN)
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        assert done
        assert task.cancelled()


async def test_block_that_fails_closes_its_connection() -> None:
    """Its error is raised as it is, not in a group."""
    connection: Any = Connection()

    async def dial() -> Any:
        return connection

    with pytest.raises(KeyError):
        async with connected(dial()):
            raise KeyError("a bug")
    assert connection.closed


async def test_block_that_ends_closes_its_connection() -> None:
    """The reader of its replies ends with it."""
    connection: Any = Connection()

    async def dial() -> Any:
        return connection

    async with connected(dial()):
        await asyncio.sleep(0)
    assert connection.closed
    assert connection.broken.cancelled()
