"""A frontend on another origin reads every answer, with the CORS middleware around ours or inside of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from websockets.asyncio.client import connect
from websockets.typing import Origin

from asgi_cluster import Cluster, ClusterMiddleware, CookieConfig, RealtimeConfig, SessionConfig, get_session
from loadtest.ports import free_port
from tests.support.machine import LOCAL
from tests.support.nodes import Node, serve
from tests.support.servers import start_valkey

FRONTEND = "https://app.example"
CORS: dict[str, Any] = {"allow_origins": [FRONTEND], "allow_credentials": True}


async def visit(request: Request) -> JSONResponse:
    request.session["visits"] = request.session.get("visits", 0) + 1
    return JSONResponse(request.session["visits"])


async def conflict(request: Request) -> PlainTextResponse:
    """Another request changes the same session meanwhile."""
    request.session["mine"] = 1
    async with httpx.AsyncClient(headers={"cookie": request.headers["cookie"]}) as other:
        await other.get(str(request.url.replace(path="/visit")))
    return PlainTextResponse("saved")


async def logout(request: Request) -> JSONResponse:
    return JSONResponse((await get_session(request).logout()).sessions)


ROUTES = [Route("/visit", visit), Route("/conflict", conflict), Route("/logout", logout)]


def around(cluster: Cluster) -> Any:
    return CORSMiddleware(ClusterMiddleware(Starlette(routes=ROUTES), cluster), **CORS)


def inside(cluster: Cluster) -> Any:
    app = Starlette(routes=ROUTES, middleware=[Middleware(CORSMiddleware, **CORS)])
    return ClusterMiddleware(app, cluster)


ORDERS = pytest.mark.parametrize("order", [around, inside])


@asynccontextmanager
async def served(
    order: Callable[[Cluster], Any], url: str, prefix: str, allowed: list[str] | None = None
) -> AsyncIterator[Node]:
    cluster = Cluster(
        url,
        prefix=prefix,
        sessions=SessionConfig(cookie=CookieConfig(secure=False), conflict="error"),
        realtime=RealtimeConfig(allowed_origins=allowed),
    )
    async with serve(order(cluster), lifespan="auto") as node:
        yield node


def readable(response: httpx.Response) -> bool:
    """Whether a browser lets the page read the answer to a request with credentials."""
    headers = response.headers
    allowed = headers.get_list("access-control-allow-origin") == [FRONTEND]
    return (
        allowed
        and headers.get_list("access-control-allow-credentials") == ["true"]
        and "origin" in headers.get("vary", "").lower()
    )


@ORDERS
@pytest.mark.parametrize("allowed", [None, [FRONTEND]])
async def test_answers_are_readable(
    order: Callable[[Cluster], Any], allowed: list[str] | None, redis_url: str, prefix: str
) -> None:
    """Those of the app and ours, 409 among them; the preflight passes; ``client.js`` loads as a module."""
    async with (
        served(order, redis_url, prefix, allowed) as node,
        httpx.AsyncClient(base_url=node.url, headers={"origin": FRONTEND}) as http,
    ):
        preflight = {"access-control-request-method": "GET"}
        assert readable(await http.options("/visit", headers=preflight))
        assert readable(await http.get("/visit"))
        refused = await http.get("/conflict")
        assert refused.status_code == 409
        assert readable(refused)
        assert readable(await http.get("/logout"))
        script = await http.get("/realtime/client.js")
        assert script.status_code == 200
        assert script.headers["access-control-allow-origin"] in ("*", FRONTEND)
        foreign = await http.get("/visit", headers={"origin": "https://evil.example"})
        assert not readable(foreign)
        if allowed is not None:
            async with connect(f"{node.ws_url}/realtime/websocket", origin=Origin(FRONTEND)):
                pass


@ORDERS
async def test_503_is_readable(order: Callable[[Cluster], Any], prefix: str) -> None:
    """A session that cannot be read, and one that cannot be saved."""
    with start_valkey() as server:
        async with (
            served(order, server.url, prefix, [FRONTEND]) as node,
            httpx.AsyncClient(base_url=node.url, headers={"origin": FRONTEND}) as http,
        ):
            assert (await http.get("/visit")).status_code == 200
            cookies = dict(http.cookies)
            server.kill()
            http.cookies.clear()
            for kept in ({}, cookies):
                http.cookies.update(kept)
                answer = await http.get("/visit")
                assert answer.status_code == 503
                assert readable(answer)
            foreign = await http.get("/visit", headers={"origin": "https://evil.example"})
            assert foreign.status_code == 503
            assert not readable(foreign)


@ORDERS
async def test_503_of_a_start_that_fails_is_readable(order: Callable[[Cluster], Any], prefix: str) -> None:
    """On a server without lifespan, too."""
    cluster = Cluster(
        f"redis://{LOCAL}:{free_port()}",
        prefix=prefix,
        realtime=RealtimeConfig(allowed_origins=[FRONTEND]),
    )
    async with (
        serve(order(cluster), lifespan="off") as node,
        httpx.AsyncClient(base_url=node.url, headers={"origin": FRONTEND}) as http,
    ):
        answer = await http.get("/visit")
        assert answer.status_code == 503
        assert readable(answer)
