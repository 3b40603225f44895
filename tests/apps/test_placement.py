"""Where the middleware stands among others, in apps of all shapes, on servers with and without lifespan."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser, requires
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from asgi_cluster import Cluster, ClusterMiddleware, SessionConfig, get_session
from loadtest.ports import free_port
from tests.apps import django_app, starlette_app
from tests.apps.kit import CHUNKS, Seen, make_cluster
from tests.support.machine import LOCAL
from tests.support.nodes import serve
from tests.support.waiting import eventually


@pytest.fixture
def cluster(prefix: str) -> Cluster:
    return make_cluster(f"memory://{prefix}", prefix)


def browser(app: Any, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver", **options)


def bare(cluster: Cluster, **options: Any) -> Starlette:
    return starlette_app.make_app(cluster, Seen(), **options)


# Shapes of apps


async def test_mounted_sub_apps_share_the_session_of_the_request(cluster: Cluster) -> None:
    """However deep: one session, one cookie."""
    inner = Mount("/deep", app=bare(cluster))
    app = ClusterMiddleware(Starlette(routes=[Mount("/sub", routes=[inner]), *bare(cluster).routes]), cluster)
    async with browser(app) as client:
        assert (await client.post("/visit")).json() == {"visits": 1}
        assert (await client.post("/sub/deep/visit")).json() == {"visits": 2}
        assert len(client.cookies) == 1


async def test_wrapping_twice_is_harmless(cluster: Cluster) -> None:
    """The inner one stands aside: one cookie, one count, one start."""
    app = ClusterMiddleware(ClusterMiddleware(bare(cluster), cluster), cluster)
    async with serve(app) as node, httpx.AsyncClient() as client:
        first = await client.post(f"{node.url}/visit")
        assert len(first.headers.get_list("set-cookie")) == 1
        assert (await client.post(f"{node.url}/visit")).json() == {"visits": 2}


async def test_wrapped_sub_app_of_an_app_that_is_not(cluster: Cluster) -> None:
    """Only what is inside has sessions; outside, ``get_session`` says what is missing."""

    async def outside(request: Request) -> Response:
        with pytest.raises(RuntimeError, match="ClusterMiddleware"):
            get_session(request)
        return JSONResponse("ok")

    wrapped = ClusterMiddleware(bare(cluster), cluster)
    app = Starlette(routes=[Route("/outside", outside), Mount("/inside", app=wrapped)])
    async with browser(app) as client:
        assert (await client.get("/outside")).status_code == 200
        assert (await client.post("/inside/visit")).json() == {"visits": 1}
        assert (await client.post("/inside/visit")).json() == {"visits": 2}


# Among other middleware


def _before(cluster: Cluster, middleware: Middleware) -> Any:
    wrapped = ClusterMiddleware(bare(cluster), cluster)
    return middleware.cls(wrapped, *middleware.args, **middleware.kwargs)


def _after(cluster: Cluster, middleware: Middleware) -> Any:
    return ClusterMiddleware(bare(cluster, middleware=[middleware]), cluster)


def _added(cluster: Cluster, middleware: Middleware) -> Any:
    ours = Middleware(ClusterMiddleware, cluster=cluster)
    return bare(cluster, middleware=[middleware, ours])


@pytest.mark.parametrize("place", [_before, _after, _added])
async def test_cors_and_gzip_around_and_inside(cluster: Cluster, place: Callable[..., Any]) -> None:
    """Their headers and ours arrive; ``Vary`` keeps every name."""
    cors = Middleware(
        CORSMiddleware, allow_origins=["https://a.example", "https://b.example"], allow_credentials=True
    )
    app = GZipMiddleware(place(cluster, cors), minimum_size=1)
    async with browser(app, headers={"origin": "https://a.example"}) as client:
        await client.post("/visit")
        response = await client.get("/me")
        assert response.json() == {"user": None, "visits": 1}
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert response.headers["content-encoding"] == "gzip"
        vary = {name.strip().lower() for name in ",".join(response.headers.get_list("vary")).split(",")}
        assert {"cookie", "origin", "accept-encoding"} <= vary
        assert (await client.get("/stream")).text == "".join(CHUNKS)


class BySession(AuthenticationBackend):
    """Starlette's authentication, fed from our session."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        user = get_session(conn).user_id
        return None if user is None else (AuthCredentials(["authenticated"]), SimpleUser(user))


async def test_authentication_middleware_reads_our_session(cluster: Cluster) -> None:
    """``@requires`` works from the login on, and no longer after the logout."""

    @requires("authenticated")
    async def secret(request: Request) -> Response:
        return JSONResponse(request.user.display_name)

    routes = [Route("/secret", secret), *bare(cluster).routes]
    inner = Starlette(routes=routes, middleware=[Middleware(AuthenticationMiddleware, backend=BySession())])
    async with browser(ClusterMiddleware(inner, cluster)) as client:
        assert (await client.get("/secret")).status_code == 403
        await client.post("/login", params={"user": "ada"})
        assert (await client.get("/secret")).json() == "ada"
        await client.post("/logout")
        assert (await client.get("/secret")).status_code == 403


async def test_function_middleware_may_change_the_session(cluster: Cluster) -> None:
    """Starlette's ``BaseHTTPMiddleware`` runs the app in another task: changes on both sides are saved."""

    async def count(request: Request, call_next: Any) -> Response:
        request.session["seen"] = request.session.get("seen", 0) + 1
        response: Response = await call_next(request)
        request.session["after"] = True
        return response

    async def show(request: Request) -> Response:
        request.session["inside"] = True
        return JSONResponse(dict(request.session))

    inner = Starlette(
        routes=[Route("/show", show)], middleware=[Middleware(BaseHTTPMiddleware, dispatch=count)]
    )
    async with browser(ClusterMiddleware(inner, cluster)) as client:
        assert (await client.get("/show")).json() == {"seen": 1, "inside": True}
        assert (await client.get("/show")).json() == {"seen": 2, "inside": True, "after": True}


async def test_foreign_session_middleware_inside_is_one_clear_error(cluster: Cluster) -> None:
    """Starlette's own one replaces our session: said by name at the first request, not lost in silence."""
    inner = bare(cluster, middleware=[Middleware(SessionMiddleware, secret_key="x")])
    async with browser(ClusterMiddleware(inner, cluster)) as client:
        with pytest.raises(TypeError, match=r"scope_key=None.*get_session"):
            await client.post("/visit")


async def test_foreign_session_middleware_inside_is_left_alone_without_scope_key(prefix: str) -> None:
    """``scope_key=None``: theirs in ``request.session``, ours by ``get_session``, two cookies."""

    async def both(request: Request) -> Response:
        ours = get_session(request)
        ours["count"] = ours.get("count", 0) + 1
        request.session["count"] = request.session.get("count", 0) + 10
        return JSONResponse([ours["count"], request.session["count"]])

    cluster = make_cluster(f"memory://{prefix}", prefix, scope_key=None)
    theirs = Middleware(SessionMiddleware, secret_key="x", session_cookie="theirs")
    inner = Starlette(routes=[Route("/both", both)], middleware=[theirs])
    async with browser(ClusterMiddleware(inner, cluster)) as client:
        assert (await client.get("/both")).json() == [1, 10]
        assert (await client.get("/both")).json() == [2, 20]
        assert set(client.cookies) == {"session", "theirs"}


async def test_foreign_session_middleware_outside_gets_none_of_our_data(cluster: Cluster) -> None:
    """Starlette's own one outside of ours must not sign our session's contents into its cookie."""
    app = SessionMiddleware(ClusterMiddleware(bare(cluster), cluster), "x", session_cookie="theirs")
    async with browser(app) as client:
        await client.post("/login", params={"user": "ada"})
        assert (await client.post("/visit")).json() == {"visits": 1}
        assert (await client.get("/me")).json() == {"user": "ada", "visits": 1}
        assert "theirs" not in client.cookies


async def test_djangos_own_session_stays_its_own(prefix: str) -> None:
    """Both count on their own; a logout of ours leaves Django's alone."""
    cluster = make_cluster(f"memory://{prefix}", prefix, scope_key=None)
    async with browser(ClusterMiddleware(django_app.make_app(cluster, Seen()), cluster)) as client:
        await client.post("/login", params={"user": "ada"})
        await client.post("/visit")
        assert (await client.get("/djangos_own")).json() == {"count": 1}
        assert (await client.get("/djangos_own")).json() == {"count": 2}
        await client.post("/logout")
        assert (await client.get("/djangos_own")).json() == {"count": 3}
        assert (await client.get("/me")).json() == {"user": None, "visits": 0}


# Lifespan


async def test_cluster_is_ready_before_the_app_starts_and_until_it_has_stopped(
    redis_url: str, prefix: str
) -> None:
    """The app's own startup and shutdown may use it."""
    cluster = make_cluster(redis_url, prefix)
    events = []

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
        await cluster.room("lobby").broadcast("starting")
        events.append((cluster.started, cluster.ready))
        yield {"state": "kept"}
        await cluster.room("lobby").broadcast("stopping")
        events.append((cluster.started, cluster.ready))

    async def state(request: Request) -> Response:
        return JSONResponse(request.state.state)

    app = ClusterMiddleware(Starlette(routes=[Route("/", state)], lifespan=lifespan), cluster)
    async with serve(app) as node, httpx.AsyncClient() as client:
        assert (await client.get(node.url)).json() == "kept"
    assert events == [(True, True), (True, True)]
    assert not cluster.started


async def test_app_whose_startup_fails_stops_the_cluster(redis_url: str, prefix: str) -> None:
    """Its error is the server's, and no connection of ours stays."""
    cluster = make_cluster(redis_url, prefix)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        raise RuntimeError("no database")
        yield

    with pytest.RaisesGroup(
        pytest.RaisesExc(RuntimeError, match="refused to start"), flatten_subgroups=True, allow_unwrapped=True
    ):
        async with serve(ClusterMiddleware(Starlette(lifespan=lifespan), cluster)):
            pytest.fail("it started")
    assert not cluster.started


async def test_server_without_lifespan_starts_at_the_first_request(redis_url: str, prefix: str) -> None:
    """``redis://`` needs a start, which the first request makes. A second start is refused."""
    cluster = make_cluster(redis_url, prefix)
    async with (
        serve(ClusterMiddleware(bare(cluster), cluster), lifespan="off") as node,
        httpx.AsyncClient() as client,
    ):
        assert (await client.get(f"{node.url}/quiet")).status_code == 200
        assert (await client.post(f"{node.url}/visit")).json() == {"visits": 1}
        with pytest.raises(RuntimeError, match="already started"):
            await cluster.__aenter__()
        await cluster.__aexit__()


async def test_server_without_lifespan_needs_none_on_memory(cluster: Cluster) -> None:
    """``memory://`` just works."""
    app = ClusterMiddleware(bare(cluster), cluster)
    async with serve(app, lifespan="off") as node, httpx.AsyncClient() as client:
        await client.post(f"{node.url}/visit")
        assert (await client.post(f"{node.url}/visit")).json() == {"visits": 2}


# Other servers


@asynccontextmanager
async def hypercorn(app: Any) -> AsyncIterator[int]:
    from hypercorn.asyncio import serve as run
    from hypercorn.config import Config

    config, port, stop = Config(), free_port(), asyncio.Event()
    config.bind = [f"{LOCAL}:{port}"]
    config.graceful_timeout = 1.0
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run(app, config, shutdown_trigger=stop.wait))
        try:
            yield port
        finally:
            stop.set()


@asynccontextmanager
async def granian(app: Any) -> AsyncIterator[int]:
    from granian.constants import Interfaces
    from granian.server.embed import Server

    port = free_port()
    server = Server(app, address=LOCAL, port=port, interface=Interfaces.ASGI, log_enabled=False)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        try:
            yield port
        finally:
            server.stop()


@asynccontextmanager
async def uvicorn_on(app: Any, ws: str) -> AsyncIterator[int]:
    async with serve(app, ws=ws) as node:
        yield node.port


SERVERS: dict[str, Callable[[Any], Any]] = {
    "hypercorn": hypercorn,
    "granian": granian,
    "uvicorn-wsproto": lambda app: uvicorn_on(app, "wsproto"),
    "uvicorn-websockets": lambda app: uvicorn_on(app, "websockets"),
}


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOCAL, port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


@pytest.mark.filterwarnings("ignore:The `websockets` impl", "ignore::DeprecationWarning")
@pytest.mark.parametrize("server", SERVERS)
async def test_other_server_serves_sessions_sockets_and_live_logout(
    server: str, cluster_url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The same app on another server: the socket of an app that knows nothing of us closes with 4501."""
    cluster, seen = make_cluster(cluster_url, prefix), Seen()
    app = ClusterMiddleware(starlette_app.make_app(cluster, seen), cluster)
    async with SERVERS[server](app) as port, httpx.AsyncClient(base_url=f"http://{LOCAL}:{port}") as client:
        await eventually(lambda: _answers(port))
        await client.post("/login", params={"user": "ada"})
        assert (await client.post("/visit")).json() == {"visits": 1}
        assert (await client.get("/stream")).text == "".join(CHUNKS)
        cookie = {"Cookie": f"session={client.cookies['session']}"}
        address = f"ws://{LOCAL}:{port}"
        async with (
            connect(f"{address}/plain", additional_headers=cookie) as plain,
            connect(f"{address}/room", additional_headers=cookie) as member,
        ):
            await plain.send("echo")
            assert await plain.recv() == "echo"
            await member.send("hello")
            assert await member.recv() == "hello"
            assert (await client.post("/logout")).json() == {"closed": 2}
            for socket in (plain, member):
                with pytest.raises(ConnectionClosed) as closed:
                    await socket.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 4501
        await eventually(lambda: len(seen.closes) == 1)
        assert (await client.get("/me")).json() == {"user": None, "visits": 0}
    noisy = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert noisy == []


async def test_unknown_server_has_the_close_before_the_app_hears_of_it(prefix: str) -> None:
    """A server may end the connection when the app returns (granian does): then no code would go out."""
    cluster = Cluster(f"memory://{prefix}", identify=lambda scope: "ada")
    events: list[str] = []
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue(2)
    inbox.put_nowait({"type": "websocket.connect"})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        assert (await receive())["code"] == 4501
        events.append("app told")

    async def send(message: Any) -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        events.append(message["type"])

    scope = {"type": "websocket", "path": "/", "headers": [], "scheme": "ws", "query_string": b""}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ClusterMiddleware(app, cluster)(scope, inbox.get, send))
        await eventually(lambda: "websocket.accept" in events)
        assert cluster._parts.hub.close_user("ada", 4501, "logged out") == 1
    assert events == ["websocket.accept", "websocket.close", "app told"]


async def test_scope_key_of_ones_own(prefix: str) -> None:
    """``scope_key="state_of_mine"`` leaves ``session`` free."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert "session" not in scope
        scope["mine"]["visits"] = scope["mine"].get("visits", 0) + 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(scope["mine"]).encode()})

    cluster = Cluster(f"memory://{prefix}", sessions=SessionConfig(scope_key="mine"))
    transport = httpx.ASGITransport(ClusterMiddleware(app, cluster))
    async with httpx.AsyncClient(transport=transport, base_url="https://testserver") as client:
        await client.get("/")
        assert (await client.get("/")).json() == {"visits": 2}
