"""``receive`` of a WebSocket whose server does not end it when the socket is closed from this side."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from asgi_cluster.tasks import spawn

__all__ = ["GuardedReceive", "Message", "Receive", "Send"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class GuardedReceive:
    """An ASGI ``receive`` that ends with ``websocket.disconnect`` when ``closing`` is done, although the
    server's own goes on waiting for the client.

    ``closed`` gives the code and the reason.
    """

    __slots__ = ("_closed", "_closing", "_receive", "_received", "_tasks")

    def __init__(
        self,
        receive: Receive,
        closing: asyncio.Future[None],
        tasks: asyncio.TaskGroup,
        closed: Callable[[], tuple[int | None, str]],
    ) -> None:
        self._receive = receive
        self._closing = closing
        self._tasks = tasks
        self._closed = closed
        self._received: asyncio.Future[Message] | None = None

    async def __call__(self) -> Message:
        closing = self._closing
        if not closing.done():
            if self._received is None:
                # Not cancelled with its waiter: a server's receive may lose a message when it is.
                self._received = closing.get_loop().create_future()
                spawn(self._tasks, self._receive_into(self._received), name="asgi-cluster receive")
            await asyncio.wait((closing, self._received), return_when=asyncio.FIRST_COMPLETED)
            received, self._received = self._received, None
            if received.done() and not received.cancelled():
                return received.result()
            if not received.done():
                self._received = received
            elif not closing.done():
                await asyncio.wait((closing,))
        code, reason = self._closed()
        return {"type": "websocket.disconnect", "code": code or 1006, "reason": reason}

    async def _receive_into(self, target: asyncio.Future[Message]) -> None:
        reader = asyncio.current_task()
        assert reader is not None
        target.add_done_callback(lambda done: reader.cancel() if done.cancelled() else None)
        try:
            message = await self._receive()
        except Exception as error:
            if not target.done():
                target.set_exception(error)
        else:
            if not target.done():
                target.set_result(message)

    def cancel(self) -> bool:
        """Stop waiting for the client. False when nothing was waiting."""
        received = self._received
        return received is not None and received.cancel()

    def detach(self) -> None:
        """The ASGI call is over."""
        received = self._received
        if received is not None and not received.cancel() and not received.cancelled():
            received.exception()  # retrieved here: it is not awaited any more
