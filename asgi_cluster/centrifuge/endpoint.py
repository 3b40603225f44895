"""The built-in endpoint: ``<path>/websocket`` for clients, ``<path>/client.js`` for browsers without an
SDK.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from asgi_cluster.centrifuge.client_session import ClientSession
from asgi_cluster.centrifuge.limits import ConnectionLimits
from asgi_cluster.centrifuge.services import Services
from asgi_cluster.centrifuge.wire import JSON
from asgi_cluster.codes import CloseCode
from asgi_cluster.rooms.connection import Connection
from asgi_cluster.scope import ScopeState
from asgi_cluster.sockets.receiving import Receive, Send

if TYPE_CHECKING:
    from asgi_cluster.config import RealtimeConfig
    from asgi_cluster.node import Node
    from asgi_cluster.rooms.rooms import Rooms
    from asgi_cluster.sockets.hub import Hub
    from asgi_cluster.sockets.origin import Origins

__all__ = ["Endpoint"]

logger = logging.getLogger("asgi_cluster.realtime")

_FILES = {"client.js": b"text/javascript; charset=utf-8", "client.d.ts": b"text/plain; charset=utf-8"}
_SUBPROTOCOL = "centrifuge-json"
_PROTOBUF = "centrifuge-protobuf"

Headers = list[tuple[bytes, bytes]]


class Endpoint:
    """An ASGI app, called by the middleware for everything below ``RealtimeConfig.path``."""

    def __init__(
        self, config: RealtimeConfig, *, node: Node, hub: Hub, rooms: Rooms, origins: Origins, cluster: Any
    ) -> None:
        self._config = config
        self._hub = hub
        self._origins = origins
        self._cluster = cluster
        self._services = Services(
            config, node, hub, rooms, ConnectionLimits(rooms.memberships.presence, config)
        )
        self._refused_protobuf = False

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve a file, or a client until it is gone."""
        name = scope["path"].rpartition(f"{self._config.path}/")[2]
        if scope["type"] == "http":
            await self._http(name, scope, send)
            return
        client = await self._accept(name, scope, receive, send)
        if client is not None:
            await client.run(receive)

    async def _http(self, name: str, scope: Mapping[str, Any], send: Send) -> None:
        if name == "websocket":
            headers = [(b"upgrade", b"websocket"), (b"connection", b"upgrade")]
            await _respond(send, 426, headers, b"This is a WebSocket endpoint.\n")
            return
        content = _content(name)
        if content is None:
            await _respond(send, 404, [], b"Not found.\n")
            return
        if scope["method"] not in ("GET", "HEAD"):
            await _respond(send, 405, [(b"allow", b"GET, HEAD")], b"Method not allowed.\n")
            return
        body, tag = content
        # no-cache: browsers keep it and check for changes each time, so that a new version of the package is
        # used at once.
        # Pages of every origin may load it: it is the same public file for all of them.
        headers = [
            (b"etag", tag),
            (b"cache-control", b"no-cache"),
            (b"x-content-type-options", b"nosniff"),
            (b"access-control-allow-origin", b"*"),
        ]
        known = _header(scope, b"if-none-match")
        if known is not None and (
            known.strip() == b"*" or tag in [part.strip().removeprefix(b"W/") for part in known.split(b",")]
        ):
            await send({"type": "http.response.start", "status": 304, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        headers += [(b"content-type", _FILES[name]), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _accept(
        self, name: str, scope: Mapping[str, Any], receive: Receive, send: Send
    ) -> ClientSession | None:
        await receive()  # websocket.connect
        refused = 404 if name != "websocket" else 403 if not self._origins.permit(scope) else None
        if refused is not None:
            state = ScopeState.of(scope)
            await _refuse(scope, send, refused)
            if state is not None and state.socket is not None:
                state.socket.refused()
            return None
        state = ScopeState.of(scope)
        assert state is not None
        assert state.socket is not None
        socket = state.socket
        offered = scope.get("subprotocols", ())
        if _PROTOBUF in offered and _SUBPROTOCOL not in offered:
            await self._refuse_protobuf(send)
            return None
        subprotocol = _SUBPROTOCOL if _SUBPROTOCOL in offered else None
        await send({"type": "websocket.accept", "subprotocol": subprotocol, "headers": []})
        outbox = self._hub.outboxes.open(socket, JSON)
        connection = socket.connection = Connection(socket, state.session, outbox, self._cluster)
        return ClientSession(self._services, connection)

    async def _refuse_protobuf(self, send: Send) -> None:
        """Accepted with its own subprotocol, because SDKs get no code from a refused handshake and retry it
        for ever: 3506 is final for them, and they report the reason.
        """
        code = CloseCode.INAPPROPRIATE_PROTOCOL
        if not self._refused_protobuf:
            self._refused_protobuf = True
            logger.warning(
                "closed a client with %d: it speaks only the Protobuf form of the Centrifuge protocol "
                "(subprotocol %s), and this endpoint only JSON. Use an SDK that speaks JSON (JavaScript, "
                "Python, Go) and do not switch it to Protobuf. Logged once",
                code,
                _PROTOBUF,
            )
        await send({"type": "websocket.accept", "subprotocol": _PROTOBUF, "headers": []})
        await send({"type": "websocket.close", "code": int(code), "reason": f"{code.text}: JSON only"})


def _header(scope: Mapping[str, Any], name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key.lower() == name:
            found: bytes = value
            return found
    return None


@cache
def _content(name: str) -> tuple[bytes, bytes] | None:
    """A file of this package as the endpoint serves it, and its entity tag."""
    if name not in _FILES:
        return None
    try:
        body = files("asgi_cluster.centrifuge").joinpath("js", name).read_bytes()
    except FileNotFoundError:
        return None
    # The module connects to the place beside it, and a copy of the file from elsewhere does not.
    body = body.replace(b"const FROM_ENDPOINT = false;", b"const FROM_ENDPOINT = true;")
    return body, b'"%s"' % hashlib.sha256(body).hexdigest()[:32].encode()


async def _respond(send: Send, status: int, headers: Headers, body: bytes) -> None:
    headers = [
        *headers,
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse(scope: Mapping[str, Any], send: Send, status: int) -> None:
    if status == 404:
        logger.info("refused a WebSocket with 404: there is no %s", scope["path"])
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": ""})  # which a server turns into 403
        return
    body = b"Not found.\n" if status == 404 else b"This origin is not allowed.\n"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
