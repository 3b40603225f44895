"""``receive`` on servers that do not end it, and the closes that take a while: without a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asgi_cluster.sockets.closes import Closes
from asgi_cluster.sockets.receiving import GuardedReceive


class Server:
    """Its ``receive`` waits for the test."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.receive = GuardedReceive(self._receive, self.closing, tasks, lambda: (4501, "logged out"))

    async def _receive(self) -> Any:
        message = await self.messages.get()
        if isinstance(message, Exception):
            raise message
        return message


ENDED = {"type": "websocket.disconnect", "code": 4501, "reason": "logged out"}


async def test_pending_receive_ends_with_the_close() -> None:
    """It ends with the code when the close has gone out, and so does each one after it."""
    async with asyncio.TaskGroup() as tasks:
        server = Server(tasks)
        pending = tasks.create_task(server.receive())
        await asyncio.sleep(0)
        server.closing.set_result(None)
        assert await pending == ENDED
        assert await server.receive() == ENDED
        assert server.receive.cancel()  # the server's own receive still waits for the client
        assert not server.receive.cancel()


async def test_cancelled_receive_loses_no_message() -> None:
    """The server's receive goes on, and the next call of the app gets what it brings."""
    async with asyncio.TaskGroup() as tasks:
        server = Server(tasks)
        pending = tasks.create_task(server.receive())
        await asyncio.sleep(0)
        pending.cancel()
        await asyncio.sleep(0)
        server.messages.put_nowait({"type": "websocket.receive", "text": "1"})
        assert await server.receive() == {"type": "websocket.receive", "text": "1"}


async def test_error_of_the_server_reaches_the_app() -> None:
    """And is asked for once: the next call waits for the client again."""
    async with asyncio.TaskGroup() as tasks:
        server = Server(tasks)
        server.messages.put_nowait(OSError("gone"))
        with pytest.raises(OSError, match="gone"):
            await server.receive()
        server.messages.put_nowait({"type": "websocket.receive", "text": "1"})
        assert (await server.receive())["text"] == "1"


async def test_failed_closes_are_counted_from_a_moment() -> None:
    """A close under way is waited for; one that failed counts, one that went out does not."""
    loop = asyncio.get_running_loop()
    closes = Closes()
    assert not closes
    assert closes.tasks is None
    async with asyncio.TaskGroup() as tasks:
        first, second = loop.create_future(), loop.create_future()
        for closing in (first, second):
            closes.begun(closing, tasks)
        assert closes.tasks is tasks

        async def end() -> None:
            for closing, failed in ((first, True), (second, False)):
                closes.finished(closing, failed=failed)
                closing.set_result(None)

        tasks.create_task(end())
        assert await closes.failed(0.0) == 1
    assert closes.tasks is None


async def test_close_that_is_late_counts_as_failed() -> None:
    """It waits for a client that does not read; when its socket is over it is forgotten."""
    closes = Closes()
    closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        closes.begun(closing, tasks)
        assert await closes.failed(0.0) == 1
        closes.forget(closing)
        assert await closes.failed(0.0) == 0
