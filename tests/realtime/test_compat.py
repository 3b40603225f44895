"""What is used of uvicorn and of websockets, and what to do when a new version has it no more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
import websockets
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State
from websockets.server import ServerProtocol

from asgi_cluster.compat import uvicorn as of_uvicorn
from asgi_cluster.compat import websockets as of_websockets
from tests.support.nodes import serve
from tests.support.waiting import eventually

pytestmark = pytest.mark.filterwarnings("ignore:.*websockets", "ignore::DeprecationWarning")

UVICORN = "uvicorn has changed: adapt asgi_cluster/compat/uvicorn.py"
WEBSOCKETS = "websockets has changed: adapt asgi_cluster/compat/websockets.py"


@pytest.mark.parametrize("name", of_uvicorn.DIRECT)
async def test_uvicorn_has_what_direct_writes_use(name: str) -> None:
    """Each attribute that direct writes use exists after the handshake and is of its kind."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket":
            return
        await receive()
        await send({"type": "websocket.accept"})
        if hasattr(send.__self__, name) and of_uvicorn.DIRECT[name](getattr(send.__self__, name)):
            seen.append(name)

    async with serve(app, lifespan="off") as node, websockets.connect(node.ws_url, proxy=None):
        await eventually(
            lambda: seen,
            message=f"{UVICORN}: {name} in DIRECT. Until then sockets work, through ASGI send",
        )


def test_uvicorn_protocols_are_recognized() -> None:
    """By their modules and names: one is written to directly, one closes in a task."""
    from uvicorn.protocols.websockets.websockets_impl import WebSocketProtocol

    for kind, direct, in_task in ((WebSocketsSansIOProtocol, True, False), (WebSocketProtocol, False, True)):
        made: Any = object.__new__(kind)
        server, reason = of_uvicorn.known_server(made.asgi_send if kind is WebSocketProtocol else made.send)
        assert server is made, f"{UVICORN}: _UVICORN_SOCKETS and known_server"
        assert (not reason) is direct, f"{UVICORN}: known_server"
        assert of_uvicorn.closes_in_task(made) is in_task, f"{UVICORN}: closes_in_task"


async def test_uvicorn_after_a_refused_handshake() -> None:
    """After an HTTP response in place of the handshake the attributes that say so are there."""
    seen: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket":
            return
        await receive()
        await send({"type": "websocket.http.response.start", "status": 404, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b""})
        of_uvicorn.refuse_handshake(send.__self__)
        seen.append(send.__self__.handshake_complete)

    async with serve(app, lifespan="off") as node:
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(node.ws_url, proxy=None)
        await eventually(lambda: seen)
    assert seen == [True], f"{UVICORN}: refuse_handshake (without it uvicorn logs an error for each refusal)"


def test_uvicorn_configuration_has_reload() -> None:
    """The option is where ``reloads`` looks."""
    config = uvicorn.Config("app:app", reload=True)
    assert of_uvicorn.reloads(SimpleNamespace(config=config)), f"{UVICORN}: reloads"


@pytest.mark.parametrize("size", [0, 5, 125, 126, 70_000])
@pytest.mark.parametrize("binary", [False, True])
def test_websockets_frame(size: int, binary: bool) -> None:
    """A message is one frame, final, unmasked and uncompressed (RFC 6455 section 5.2)."""
    data = b"x" * size
    head = bytes([0x82 if binary else 0x81])
    if size < 126:
        head += bytes([size])
    elif size < 1 << 16:
        head += b"\x7e" + size.to_bytes(2, "big")
    else:
        head += b"\x7f" + size.to_bytes(8, "big")
    assert of_websockets.frame(data, binary=binary) == head + data, f"{WEBSOCKETS}: frame"


def test_websockets_state() -> None:
    """A protocol object tells whether messages may be sent."""
    connection = ServerProtocol()
    assert not of_websockets.is_open(connection), f"{WEBSOCKETS}: is_open"
    connection.state = State.OPEN
    assert of_websockets.is_open(connection), f"{WEBSOCKETS}: is_open"
    connection.send_close()
    assert not of_websockets.is_open(connection), f"{WEBSOCKETS}: is_open"
