"""The ASGI servers that are known, and how their coroutines are run without a task."""

from __future__ import annotations

import sys
import types
from asyncio import WriteTransport
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

__all__ = [
    "closes_in_task",
    "discard",
    "drive",
    "forget_handshake",
    "known_server",
    "refuse_handshake",
    "unsent_bytes",
]

_UVICORN_SOCKETS = "uvicorn.protocols.websockets."
_TESTED_UVICORN = ("0.54.",)


def known_server(send: Callable[..., Any]) -> tuple[Any, str]:
    """uvicorn's protocol object behind ``send`` (``None`` for anything else), and why it cannot be written to
    directly.
    """
    owner = getattr(send, "__self__", None)
    module = type(owner).__module__
    if not module.startswith(_UVICORN_SOCKETS):
        return None, "server not known, or send wrapped"
    version = str(getattr(sys.modules.get("uvicorn"), "__version__", "?"))
    if not version.startswith(_TESTED_UVICORN):
        return owner, f"uvicorn {version} not tested"
    if type(owner).__name__ != "WebSocketsSansIOProtocol":
        return owner, f"uvicorn's {type(owner).__name__}"
    return owner, ""


def closes_in_task(server: Any) -> bool:
    """Whether this server's close has to run in a task of its own.

    An unknown one may need that. websockets' legacy protocol does: it waits for the closing handshake under
    ``asyncio.timeout``, which fails in a callback, and in another task would cancel that one.
    """
    return server is None or type(server).__name__ == "WebSocketProtocol"


def forget_handshake(server: Any) -> None:
    """Let go of the request and the response of a handshake that has been answered.

    A known server keeps their headers as long as the socket lives, and never looks at them again.
    """
    server.request = server.response = None


def refuse_handshake(server: Any) -> None:
    """Tell a known server that its handshake was answered with an HTTP response.

    uvicorn 0.54 forgets that by itself, and logs an error when the app returns.
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
    """Close a coroutine that nobody will await."""
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
