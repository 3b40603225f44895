"""Django's ASGI handler, alone and inside Channels. Both keep sessions of their own beside ours."""

from __future__ import annotations

import asyncio
from typing import Any

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

from asgi_cluster import Cluster, get_session
from tests.apps import plain
from tests.apps.kit import Seen
from tests.apps.starlette_app import chunks

if not settings.configured:
    settings.configure(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="for tests",
        MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"],
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        SESSION_COOKIE_NAME="djangos",
        USE_TZ=True,
    )
    django.setup()


async def login(request: HttpRequest) -> HttpResponse:
    await get_session(request.scope).login(request.GET["user"])
    return JsonResponse("ok", safe=False)


async def logout(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"closed": (await get_session(request.scope).logout()).sockets_closed})


async def clear(request: HttpRequest) -> HttpResponse:
    get_session(request.scope).clear()
    return JsonResponse("ok", safe=False)


def me(request: HttpRequest) -> HttpResponse:  # in a worker thread, as Django does with plain functions
    session = get_session(request.scope)
    return JsonResponse({"user": session.user_id, "visits": session.get("visits", 0)})


def visit(request: HttpRequest) -> HttpResponse:
    session = get_session(request.scope)
    session["visits"] = session.get("visits", 0) + 1
    return JsonResponse({"visits": session["visits"]})


def djangos_own(request: HttpRequest) -> HttpResponse:
    request.session["count"] = request.session.get("count", 0) + 1
    return JsonResponse({"count": request.session["count"]})


async def quiet(request: HttpRequest) -> HttpResponse:
    return JsonResponse("ok", safe=False)


async def stream(request: HttpRequest) -> HttpResponse:
    session = get_session(request.scope)
    session["visits"] = session.get("visits", 0) + 1
    return StreamingHttpResponse(chunks())


_working: set[asyncio.Task[None]] = set()


async def background(request: HttpRequest) -> HttpResponse:
    session = get_session(request.scope)
    cluster, seen = request.scope["cluster"], request.scope["seen"]

    async def work() -> None:
        await cluster.room("lobby").broadcast("after the response")
        seen.background.append(session.user_id)

    task = asyncio.get_running_loop().create_task(work())
    _working.add(task)
    task.add_done_callback(_working.discard)
    return JsonResponse("ok", safe=False)


urlpatterns = [
    path(view.__name__, view)
    for view in (login, logout, clear, me, visit, quiet, stream, background, djangos_own)
]


def make_app(cluster: Cluster, seen: Seen) -> Any:
    """Django for HTTP; it has no WebSockets, so a plain callable serves those. Its lifespan raises."""
    handler, sockets = get_asgi_application(), plain.make_app(cluster, seen)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await sockets(scope, receive, send)
        else:
            await handler({**scope, "cluster": cluster, "seen": seen}, receive, send)

    return app


def make_channels_app(cluster: Cluster, seen: Seen) -> Any:
    """Channels' router, its session middleware and a consumer."""
    from channels.generic.websocket import AsyncWebsocketConsumer
    from channels.routing import ProtocolTypeRouter, URLRouter
    from channels.sessions import SessionMiddlewareStack

    class Plain(AsyncWebsocketConsumer):  # type: ignore[misc]
        async def connect(self) -> None:
            assert type(self.scope["session"]).__module__ != "asgi_cluster.sessions.session"
            await self.accept()

        async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
            await self.send(text_data=text_data)

        async def disconnect(self, code: int) -> None:
            seen.closes.append(code)

    async def room(scope: Any, receive: Any, send: Any) -> None:
        async with cluster.accept((scope, receive, send)) as connection:
            await connection.join("lobby")
            async for message in connection:
                await cluster.room("lobby").broadcast(message)

    sockets = URLRouter([path("plain", Plain.as_asgi()), path("room", room)])
    handler = make_app(cluster, seen)
    return ProtocolTypeRouter({"http": handler, "websocket": SessionMiddlewareStack(sockets)})
