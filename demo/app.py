"""The demo's application: an ordinary Starlette app inside ``ClusterMiddleware``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_cluster import (
    BusUnavailable,
    Cluster,
    ClusterMiddleware,
    CookieConfig,
    RealtimeConfig,
    RoomRequest,
    RoomRule,
    SessionConfig,
    StoreUnavailable,
    get_session,
)
from demo.board import Board, BoardUnavailable, Refused, checked_fields

__all__ = ["make_app"]

logger = logging.getLogger("demo.app")

STATIC = Path(__file__).parent / "static"
BODY_LIMIT = 8_192
LONGEST_NAME = 32

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Handler = Callable[[Request], Awaitable[Response]]


def signed_in(request: RoomRequest) -> bool:
    """The rule of both rooms: the client has to be signed in."""
    return request.connection.user_id is not None


def make_app(url: str, *, label: str = "node", prefix: str = "asgi-cluster-demo") -> ClusterMiddleware:
    """The demo as one node: ``url`` is one Redis server, ``label`` the name that the page shows."""
    cluster = Cluster(
        url,
        prefix=prefix,
        node_label=label,
        # The demo is served over plain http, and scripts without https have to be able to send the cookie.
        sessions=SessionConfig(cookie=CookieConfig(name="demo", secure=False)),
        realtime=RealtimeConfig(
            rules=[
                RoomRule(
                    "board:{board_id}",
                    subscribe=signed_in,
                    publish=signed_in,
                    history=200,
                    presence=True,
                    join_leave=True,
                ),
                # Cursors and drags are soon outdated: no history, and a slow client gets fewer of them.
                RoomRule("live:{board_id}", subscribe=signed_in, publish=signed_in, slow="drop"),
            ],
            # The page calls this over its socket, so that the node that has the socket answers.
            rpc={"pulse": lambda connection, data: {"live": cluster.stats().bus.lease_remaining > 0}},
        ),
    )
    board = Board(url, "lobby")
    api = _Api(cluster, board, label)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await board.close()

    app = Starlette(
        routes=[
            Route("/", api.page),
            Route("/health", api.health),
            Route("/api/login", api.login, methods=["POST"]),
            Route("/api/logout", api.logout, methods=["POST"]),
            Route("/api/me", api.me),
            Route("/api/stats", api.stats),
            Route("/api/board", api.read_board),
            Route("/api/board/notes", api.add_note, methods=["POST"]),
            Route("/api/board/notes/{note_id}", api.edit_note, methods=["PATCH"]),
            Route("/api/board/notes/{note_id}", api.delete_note, methods=["DELETE"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        exception_handlers={
            Refused: _refused,
            HTTPException: _http_error,
            BoardUnavailable: _unavailable,
            BusUnavailable: _unavailable,
        },
        lifespan=lifespan,
    )
    return ClusterMiddleware(_Headers(app, label), cluster)


class _Api:
    def __init__(self, cluster: Cluster, board: Board, label: str) -> None:
        self._cluster = cluster
        self._board = board
        self._label = label

    async def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def health(self, request: Request) -> Response:
        ready = self._cluster.ready
        return JSONResponse({"ready": ready, "node": self._label}, status_code=200 if ready else 503)

    async def login(self, request: Request) -> Response:
        _same_origin(request)
        given = await _json(request)
        name = given.get("name") if isinstance(given, dict) else None
        if not isinstance(name, str):
            raise Refused(422, 'Send {"name": …}.')
        name = " ".join(name.split())
        if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
            raise Refused(422, f"A name has 1 to {LONGEST_NAME} printable characters.")
        session = get_session(request)
        await session.login(name)
        return JSONResponse(self._who(request))

    async def logout(self, request: Request) -> Response:
        _same_origin(request)
        session = get_session(request)
        who = session.user_id
        # It is sent as a WebSocket close reason, which has at most 123 bytes.
        reason = f"{who} signed out on {self._label}".encode()[:120].decode(errors="ignore")
        if who is None:
            receipt = await session.logout(reason=reason)
        else:
            receipt = await self._cluster.user(who).logout(reason=reason)
            await session.logout(reason=reason)  # it has ended already: this removes the cookie
        return JSONResponse(
            {
                "user": None,
                "node": self._label,
                "nodes": len(receipt.nodes_acked),
                "complete": receipt.complete,
                "sockets_closed": receipt.sockets_closed,
                "milliseconds": round(receipt.elapsed * 1000, 1),
            }
        )

    async def me(self, request: Request) -> Response:
        return JSONResponse(self._who(request))

    def _who(self, request: Request) -> dict[str, Any]:
        session = get_session(request)
        return {"user": session.user_id, "node": self._label, "handle": session.handle}

    async def stats(self, request: Request) -> Response:
        stats = self._cluster.stats()
        try:
            nodes = await self._cluster.nodes()
        except StoreUnavailable:
            nodes = []  # the figures of this node alone are still shown
        # A node that was killed and started again is registered twice until the others have removed the old
        # registration.
        latest = {_label_of(node.id): node for node in sorted(nodes, key=lambda node: node.started_at)}
        return JSONResponse(
            {
                "node": self._label,
                "ready": stats.ready,
                "cache": {**asdict(stats.cache), "hit_rate": stats.cache.hit_rate},
                "bus": asdict(stats.bus),
                "realtime": {**asdict(stats.realtime), "fallback": dict(stats.realtime.fallback)},
                "nodes": [
                    {"node": label, "sockets": node.sockets, "rooms": node.rooms, "lag": node.lag}
                    for label, node in sorted(latest.items())
                ],
            }
        )

    async def read_board(self, request: Request) -> Response:
        _signed_in(request)
        version, notes = await self._board.read()
        return JSONResponse({"version": version, "notes": notes}, headers={"cache-control": "no-store"})

    async def add_note(self, request: Request) -> Response:
        user = _may_change(request)
        note = await self._board.add(checked_fields(await _json(request)), by=user)
        await self._announce({"type": "note", "note": note})
        return JSONResponse(note, status_code=201)

    async def edit_note(self, request: Request) -> Response:
        user = _may_change(request)
        note = await self._board.edit(
            request.path_params["note_id"], checked_fields(await _json(request)), by=user
        )
        await self._announce({"type": "note", "note": note})
        return JSONResponse(note)

    async def delete_note(self, request: Request) -> Response:
        _may_change(request)
        gone = await self._board.delete(request.path_params["note_id"])
        await self._announce({"type": "gone", **gone})
        return JSONResponse(gone)

    async def _announce(self, change: dict[str, Any]) -> None:
        try:
            await self._cluster.room(f"board:{self._board.name}").broadcast(change)
        except BusUnavailable as error:
            # The change is stored. With the next change browsers find a missing version, and read the board.
            logger.warning("a change of the board was stored, but its broadcast failed: %s", error)


class _Headers:
    """Adds security headers and the node's name to every response."""

    def __init__(self, app: ASGIApp, label: str) -> None:
        self._app = app
        self._headers = {
            "content-security-policy": CSP,
            "x-content-type-options": "nosniff",
            "referrer-policy": "same-origin",
            "x-node": label,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                # Each request may reach another node with another version of the demo: revalidate every time.
                headers.setdefault("cache-control", "no-cache")
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def _label_of(node_id: str) -> str:
    return node_id.rsplit("-", 2)[0]


def _signed_in(request: Request) -> str:
    user = get_session(request).user_id
    if user is None:
        raise Refused(401, "Please sign in.")
    return user


def _may_change(request: Request) -> str:
    _same_origin(request)
    return _signed_in(request)


def _same_origin(request: Request) -> None:
    """SameSite=Lax does not distinguish the ports of a host; the Origin header does. Scripts send no Origin.

    Raises:
        Refused: 403, the request came from a page of another origin.
    """
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise Refused(403, "This request came from another site.")


async def _json(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "Send application/json.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise Refused(413, f"A request has at most {BODY_LIMIT} bytes.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "This is not JSON.") from error


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse({"error": error.reason}, status_code=error.status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def _unavailable(request: Request, error: Exception) -> Response:
    logger.warning("answered 503, because Redis did not answer: %s", error)
    return JSONResponse(
        {"error": "Redis does not answer. Please try again."}, status_code=503, headers={"retry-after": "1"}
    )


def from_environment() -> ClusterMiddleware:
    """The app for ``uvicorn --factory demo.app:from_environment``. DEMO_REDIS is the URL of Redis, DEMO_LABEL
    the name of the node.
    """
    return make_app(
        os.environ.get("DEMO_REDIS", "redis://127.0.0.1:6379/0"), label=os.environ.get("DEMO_LABEL", "node")
    )
