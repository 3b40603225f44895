"""The ASGI servers that this package recognizes, and how their coroutines are run without a task.

What is used of uvicorn and is not part of ASGI is named here, and looked at on each connection before it is
used (by the outbox, where each call counts): what ``DIRECT`` lists exists and is of the expected kind. A
uvicorn that has changed it is written to through ASGI ``send``, as any other server.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import types
from asyncio import WriteTransport
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from typing import Any

from websockets.protocol import State

__all__ = [
    "DIRECT",
    "closes_in_task",
    "discard",
    "drive",
    "forget_handshake",
    "known_server",
    "refuse_handshake",
    "reloads",
    "say_once",
    "unsent_bytes",
    "why_not_direct",
]

logger = logging.getLogger("asgi_cluster.realtime")

_UVICORN_SOCKETS = "uvicorn.protocols.websockets."

DIRECT: Mapping[str, Callable[[Any], bool]] = {
    "transport": lambda it: all(map(callable, (it.write, it.is_closing, it.abort, it.get_write_buffer_size))),
    "writable": lambda it: isinstance(it, asyncio.Event),  # cleared while the client does not read
    "handshake_complete": lambda it: it is True,
    "close_sent": lambda it: it is False,
    "disconnected": lambda it: it is False,
    "conn": lambda it: it.state is State.OPEN,
    "request": lambda it: it is not None,  # with the response kept for ever, and dropped by us
    "response": lambda it: it is not None,
}
"""What a protocol object of uvicorn must look like after its handshake, to be written to directly."""

_said: set[str] = set()


def known_server(send: Callable[..., Any]) -> tuple[Any, str]:
    """uvicorn's protocol object behind ``send`` (``None`` for anything else), and why it cannot be written to
    directly, as far as that can be seen before the handshake.
    """
    owner = getattr(send, "__self__", None)
    if not type(owner).__module__.startswith(_UVICORN_SOCKETS):
        return None, "server not known, or send wrapped"
    if type(owner).__name__ != "WebSocketsSansIOProtocol":
        return owner, f"uvicorn's {type(owner).__name__}"
    return owner, ""


def closes_in_task(server: Any) -> bool:
    """Whether this server's close has to run in a task of its own.

    An unknown one may need that. websockets' legacy protocol does: it waits for the closing handshake under
    ``asyncio.timeout``, which fails in a callback, and in another task would cancel that one.
    """
    return server is None or type(server).__name__ == "WebSocketProtocol"


def why_not_direct(server: Any) -> str:
    """What has changed in a known server that has just answered its handshake; empty: nothing."""
    for name, expected in DIRECT.items():
        try:
            if expected(getattr(server, name)):
                continue
        except AttributeError:
            pass
        if getattr(server, "disconnected", False) is True:
            return ""  # the client has gone meanwhile
        version = getattr(sys.modules.get("uvicorn"), "__version__", "?")
        return f"uvicorn {version} has another {type(server).__name__}.{name}"
    return ""


def reloads(server: Any) -> bool:
    """Whether a known server was started with ``reload=True``."""
    return getattr(getattr(server, "config", None), "reload", False) is True


def say_once(reason: str) -> None:
    """Log why sockets of this process are not written to directly."""
    if reason not in _said and len(_said) < 20:
        _said.add(reason)
        logger.info("sockets are written to through ASGI send, not directly: %s", reason)


def forget_handshake(server: Any) -> None:
    """Drop the request and the response of a handshake that has been answered.

    A known server keeps their headers as long as the socket is open, and does not read them again.
    """
    server.request = server.response = None


def refuse_handshake(server: Any) -> None:
    """Mark the handshake of a known server as answered, after an HTTP response.

    uvicorn 0.54 does not set this itself, and logs an error when the app returns.
    """
    if getattr(server, "close_sent", False) and getattr(server, "initial_response", None):
        server.handshake_complete = True


def unsent_bytes(transport: WriteTransport) -> int:
    """What a transport, possibly a closed one, has not written yet."""
    try:
        return transport.get_write_buffer_size()
    except AttributeError:
        # The second close() of asyncio's TLS transport drops its protocol, and with it the buffer.
        return 0


def drive(awaitable: Awaitable[None]) -> Awaitable[None] | None:
    """Run a coroutine without a task as far as it goes; what is left of it when it had to wait, ``None`` when
    it is done.

    Raises: what the coroutine raises.
    """
    if not isinstance(awaitable, Coroutine):
        return awaitable
    try:
        waits_for = awaitable.send(None)
    except StopIteration:
        return None
    return _resume(awaitable, waits_for)


def discard(awaitable: Awaitable[object] | None) -> None:
    """Close a coroutine that will not be awaited."""
    if isinstance(awaitable, Coroutine):
        awaitable.close()


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    # A task that awaits this sees the future that the coroutine already yielded, as if it had started it
    # itself.
    while True:
        sent: Any = None
        raised: BaseException | None = None
        try:
            sent = yield waits_for
        except BaseException as error:
            raised = error
        try:
            waits_for = coroutine.send(sent) if raised is None else coroutine.throw(raised)
        except StopIteration:
            return
