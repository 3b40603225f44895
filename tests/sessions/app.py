"""A small app for session tests, and a client for it that lives in the same event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from asgi_cluster import Cluster, ClusterMiddleware, SessionConfig, get_session
from tests.support.waiting import eventually


def describe(request: Request) -> dict[str, Any]:
    session = get_session(request)
    return {
        "data": dict(session),
        "user": session.user_id,
        "handle": session.handle,
        "new": session.is_new,
        "version": session.version,
    }


class Gate:
    """Where a request waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def pass_through(self) -> None:
        self.reached.set()
        await self.open.wait()


def make_app(gate: Gate | None = None) -> Starlette:
    async def show(request: Request) -> JSONResponse:
        return JSONResponse(describe(request))

    async def nothing(request: Request) -> JSONResponse:
        return JSONResponse("ok")

    async def put(request: Request) -> JSONResponse:
        request.session.update(await request.json())
        return JSONResponse(describe(request))

    async def put_late(request: Request) -> JSONResponse:
        values = await request.json()
        assert dict(request.session) is not None
        assert gate is not None
        await gate.pass_through()
        request.session.update(values)
        return JSONResponse("ok")

    async def append(request: Request) -> JSONResponse:
        request.session["list"].append(1)
        return JSONResponse("ok")

    async def remove(request: Request) -> JSONResponse:
        del request.session[request.query_params["key"]]
        return JSONResponse("ok")

    async def login(request: Request) -> JSONResponse:
        lifetime = request.query_params.get("lifetime")
        await get_session(request).login(request.query_params["user"], float(lifetime) if lifetime else None)
        return JSONResponse(describe(request))

    async def rotate(request: Request) -> JSONResponse:
        await get_session(request).rotate()
        return JSONResponse(describe(request))

    async def logout(request: Request) -> JSONResponse:
        receipt = await get_session(request).logout()
        return JSONResponse(
            {"sessions": receipt.sessions, "complete": receipt.complete, "acked": len(receipt.nodes_acked)}
        )

    async def logout_then_write(request: Request) -> JSONResponse:
        await get_session(request).logout()
        request.session["fresh"] = True
        return JSONResponse("ok")

    async def clear(request: Request) -> JSONResponse:
        request.session.clear()
        return JSONResponse("ok")

    async def replace(request: Request) -> JSONResponse:
        request.scope["session"] = await request.json()
        return JSONResponse("ok")

    async def unstorable(request: Request) -> JSONResponse:
        request.session["thing"] = object()
        return JSONResponse("ok")

    async def late(request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"a"
            request.session["late"] = 1
            yield b"b"

        return StreamingResponse(body())

    async def background(request: Request) -> JSONResponse:
        def work() -> None:
            request.session["late"] = 1

        return JSONResponse("ok", background=BackgroundTask(work))

    async def lock(request: Request) -> JSONResponse:
        session = get_session(request)
        async with session.lock():
            count = session.get("count", 0)
            await asyncio.sleep(0)
            session["count"] = count + 1
        return JSONResponse("ok")

    async def hop(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok", headers={"Vary": "Accept-Encoding"})

    handlers = [
        show, nothing, put, put_late, append, remove, login, rotate, logout, logout_then_write,
        clear, replace,
        unstorable, late, background, lock, hop,
    ]  # fmt: skip
    return Starlette(
        routes=[Route(f"/{handler.__name__}", handler, methods=["GET", "POST"]) for handler in handlers]
    )


def client_for(cluster: Cluster, app: Any = None, **options: Any) -> httpx.AsyncClient:
    """A browser, as far as cookies go."""
    transport = httpx.ASGITransport(ClusterMiddleware(app or make_app(), cluster), **options)
    return httpx.AsyncClient(transport=transport, base_url="https://testserver")


@asynccontextmanager
async def nodes(
    url: str, count: int = 2, *, prefix: str = "test", **options: Any
) -> AsyncIterator[list[Cluster]]:
    """Several started nodes of one cluster in this loop."""
    clusters = [Cluster(url, prefix=prefix, node_label=f"n{number}", **options) for number in range(count)]
    for cluster in clusters:
        await cluster.__aenter__()
    try:
        yield clusters
    finally:
        for cluster in reversed(clusters):
            await cluster.__aexit__(None, None, None)


def sessions(**options: Any) -> SessionConfig:
    return SessionConfig(**options)


async def eventually_shows(client: httpx.AsyncClient, **expected: Any) -> None:
    """``/show`` answers with these values, within the lease: until the message of a change on another node
    has arrived, a node may serve what was there before. Not for a logout, which has been acknowledged.
    """

    async def shown() -> bool:
        seen = (await client.get("/show")).json()
        assert {key: seen[key] for key in expected} == expected
        return True

    await eventually(shown)
