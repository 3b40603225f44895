"""What is used of uvicorn that is not part of ASGI.

``DIRECT`` names each attribute. It is checked on each connection before it is used: the attribute exists and
is of the expected kind. A uvicorn that has changed one is written to through ASGI ``send``, as any other
server.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from asyncio import WriteTransport
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from asgi_cluster.compat.websockets import is_open

__all__ = [
    "DIRECT",
    "can_write",
    "closes_in_task",
    "forget_handshake",
    "idle_transport",
    "known_server",
    "refuse_handshake",
    "reloads",
    "room_to_write",
    "say_once",
    "transport_of",
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
    "conn": is_open,
    "request": lambda it: it is not None,  # with the response kept for ever, and dropped by this package
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


def idle_transport(server: Any) -> WriteTransport | None:
    """The transport of a server that is written to directly, if what is written now goes out at once."""
    transport: WriteTransport = server.transport
    if (
        server.handshake_complete
        and not server.close_sent
        and not transport.is_closing()
        and not transport.get_write_buffer_size()
    ):
        return transport
    return None


def can_write(server: Any) -> bool:
    """Whether a frame may be written to the transport of a server that is written to directly.

    Not through the server's own send: so its state is checked before each write. Nothing may follow a close
    frame.
    """
    return (
        server.handshake_complete
        and not server.close_sent
        and not server.disconnected
        and is_open(server.conn)
        and not server.transport.is_closing()
    )


def room_to_write(server: Any) -> Awaitable[None] | None:
    """Done when the client has read enough for the next write; ``None``: it has."""
    if server.writable.is_set():
        return None
    waiting: Awaitable[None] = server.writable.wait()
    return waiting


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


def transport_of(server: Any) -> WriteTransport | None:
    """The transport of a known server; ``None`` where it cannot be reached."""
    transport = getattr(server, "transport", None)
    return transport if hasattr(transport, "get_write_buffer_size") else None


def unsent_bytes(transport: WriteTransport) -> int:
    """What a transport, possibly a closed one, has not written yet."""
    try:
        return transport.get_write_buffer_size()
    except AttributeError:
        # The second close() of asyncio's TLS transport drops its protocol, and with it the buffer.
        return 0
