"""A browser whose requests run what the test gives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_cluster import Cluster, Session, get_session
from asgi_cluster.exceptions import ClusterError
from tests.sessions.app import client_for

Work = Callable[[Session], Any]
"""What a request does with its session, synchronous or not; what it returns is the body, as JSON."""


class Browser:
    """Keeps its cookie. ``on(node, work)`` is one request."""

    def __init__(self, cookies: httpx.Cookies | None = None) -> None:
        self.cookies = httpx.Cookies(cookies)

    def tab(self) -> Browser:
        """Another browser that has the same cookie now, and does not get what this one is sent later."""
        return Browser(self.cookies)

    async def on(self, cluster: Cluster, work: Work, *, raise_app_exceptions: bool = False) -> httpx.Response:
        """Real Starlette inside the middleware, so that an exception of ``work`` is answered as in an app."""

        async def endpoint(request: Request) -> JSONResponse:
            result = work(get_session(request))
            return JSONResponse(await result if inspect.isawaitable(result) else result)

        app = Starlette(routes=[Route("/", endpoint)])
        async with client_for(cluster, app, raise_app_exceptions=raise_app_exceptions) as client:
            client.cookies = self.cookies
            response = await client.get("/")
            self.cookies = client.cookies
        return response

    async def data(self, cluster: Cluster) -> dict[str, Any]:
        """The contents as a request to ``cluster`` sees them."""
        found: dict[str, Any] = (await self.on(cluster, dict)).json()
        return found

    async def truth(self, cluster: Cluster) -> dict[str, Any] | None:
        """The contents as the store has them; ``None``: no such session."""

        async def read(session: Session) -> dict[str, Any] | None:
            return dict(session) if await session.reload() else None

        found: dict[str, Any] | None = (await self.on(cluster, read)).json()
        return found


async def attempt(awaitable: Any) -> None:
    """An error of the package's is what the test provokes."""
    with suppress(ClusterError):
        await awaitable
