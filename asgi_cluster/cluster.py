"""The cluster: composes store, cache, bus and hub, and owns their lifetime."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import re
import secrets
import socket as sockets
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from ssl import SSLContext
from typing import Any, Self

from starlette.requests import HTTPConnection

from asgi_cluster.arguments import described, expect, expect_callable
from asgi_cluster.arguments import seconds as in_seconds
from asgi_cluster.asgi.draining import Drainer, draining_on_sigterm, reloads
from asgi_cluster.asgi.first_request import LazyStart
from asgi_cluster.asgi.origin import Origins
from asgi_cluster.backends.choose import open_backend
from asgi_cluster.bus.bus import NodeInfo
from asgi_cluster.bus.lease import boot_clock
from asgi_cluster.centrifuge.endpoint import Endpoint
from asgi_cluster.config import DEFAULT_DRAIN, CacheConfig, CookieConfig, RealtimeConfig, SessionConfig
from asgi_cluster.dispatch import Dispatch
from asgi_cluster.exceptions import ClusterError, NotStarted
from asgi_cluster.ids import NodeId, check_user
from asgi_cluster.remote import Reach, RemoteSession, RemoteUser, check_handle
from asgi_cluster.rooms.acceptance import Acceptance
from asgi_cluster.rooms.payload import encode_payload
from asgi_cluster.rooms.rooms import Room, Rooms
from asgi_cluster.scope import ScopeState
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.reads import CachedStore
from asgi_cluster.sessions.revalidation import Verifier
from asgi_cluster.sessions.service import SessionService
from asgi_cluster.sessions.session import Session
from asgi_cluster.sockets.hub import Hub
from asgi_cluster.stats import ClusterStats
from asgi_cluster.tasks import Failing, check_loop, keep_running, running_asyncio_loop

__all__ = ["Cluster", "get_session"]

logger = logging.getLogger("asgi_cluster")

_WRAPPED: Mapping[type, str] = {
    CookieConfig: ": write SessionConfig(cookie=CookieConfig(…))",
    CacheConfig: ": write SessionConfig(cache=CacheConfig(…))",
}
_DRAIN_EACH = 0.05  # seconds that a drain on SIGTERM takes for each socket, up to RealtimeConfig.drain in all


class Cluster:
    """This process's membership in a cluster of nodes that share sessions and rooms.

    Pass it to ``ClusterMiddleware``, which starts and stops it in ASGI lifespan, or enter it with ``async
    with cluster:``. On a server without lifespan the first request starts it. It can be started again after
    it was stopped, on another event loop too. ``memory://`` needs no start, and works on any loop without
    one; started, it belongs to the loop that did it, as the others.

    Args:
        url: ``memory://``, ``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://`` or
            ``redis+cluster://``. ``None``: the environment variable ``ASGI_CLUSTER_URL``, else ``memory://``,
            which is logged as a warning with ``listen=False``.
        prefix: starts every key and channel name; clusters with different prefixes do not see each other.
        node_label: readable part of the node id (``label-pid-random``); ``None``: the host name.
        listen: ``False`` for a publisher outside the web: no registration, no sockets, and no subscriber but
            the one that its first logout opens for the nodes' acknowledgements.
        deadline: seconds, or a ``timedelta``, of Redis work per operation, in all; at most
            ``sessions.cache.lease``. A request until its response starts is one operation; after that, and on
            a WebSocket, each call is one.
        rooms_url: a Redis of its own for rooms, the same on all nodes; ``None``: that of ``url``.
        identify: ``(scope) -> str | None``, sync or async: names the user of a socket when the session does
            not.
        sessions: see ``SessionConfig``; ``None``: its defaults.
        realtime: see ``RealtimeConfig``; ``None``: its defaults.
        ssl_context: for ``rediss://`` and its relatives, in ``url`` and ``rooms_url``; ``None``: the system's
            defaults.
        credential_provider: a redis-py ``CredentialProvider``, in place of user and password, for ``url`` and
            ``rooms_url`` as far as they have none.

    Raises:
        TypeError, ValueError: an argument makes no sense; the text says which and why, and has no password.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        prefix: str = "asgi-cluster",
        node_label: str | None = None,
        listen: bool = True,
        deadline: float | timedelta = 1.0,
        rooms_url: str | None = None,
        identify: Callable[[Mapping[str, Any]], str | Awaitable[str | None] | None] | None = None,
        sessions: SessionConfig | None = None,
        realtime: RealtimeConfig | None = None,
        ssl_context: SSLContext | None = None,
        credential_provider: Any = None,
    ) -> None:
        expect("url", url, str, None)
        if url == "":
            raise ValueError(
                "url is an empty string: give a URL, or None for the environment variable ASGI_CLUSTER_URL "
                "or memory://"
            )
        expect("prefix", prefix, str)
        expect("node_label", node_label, str, None)
        expect("listen", listen, bool)
        expect("rooms_url", rooms_url, str, None)
        expect_callable("identify", identify)
        expect("sessions", sessions, SessionConfig, None, cure=_WRAPPED.get(type(sessions), ""))
        expect("realtime", realtime, RealtimeConfig, None)
        deadline = in_seconds("deadline", deadline)
        sessions = sessions or SessionConfig()
        self.realtime = realtime or RealtimeConfig()
        if not 0 < deadline <= sessions.cache.lease:
            raise ValueError(
                f"deadline must be above 0, at most the lease {sessions.cache.lease:g}, not {deadline!r}: "
                "a write whose outcome is unknown has to be settled before a cached read may be trusted again"
            )
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", prefix):
            raise ValueError(f"prefix must be 1 to 64 of A-Z a-z 0-9 _ . : -, not {prefix!r}")
        if node_label is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", node_label):
            raise ValueError(f"node_label must be 1 to 64 of A-Z a-z 0-9 _ . -, not {node_label!r}")
        self.identify = identify
        self.listen = listen
        self.deadline = deadline
        self._label = node_label
        self._node: NodeId | None = None
        self._backend = open_backend(
            url or os.environ.get("ASGI_CLUSTER_URL") or "memory://",
            prefix=prefix,
            lease_duration=sessions.cache.lease,
            rooms_url=rooms_url,
            ssl_context=ssl_context,
            credential_provider=credential_provider,
            wait_replicas=sessions.wait_replicas,
            stale_for=sessions.stale_for if sessions.on_store_error == "stale" else 0.0,
        )
        self._alone = not url and not os.environ.get("ASGI_CLUSTER_URL")
        self._warn_of_no_url()
        self._warn_of_siblings()
        bus = self._backend.bus
        cache = SessionCache(
            bus.lease,
            ttl=sessions.cache.ttl,
            max_entries=sessions.cache.max_entries,
            stale_for=sessions.stale_for if sessions.on_store_error == "stale" else 0.0,
        )
        self.hub = Hub(subscriptions=bus, config=self.realtime)
        self.service = SessionService(
            CachedStore(self._backend.store, cache),
            sessions,
            deadline=deadline,
            sockets=self.hub,
            node=self._current_node,
            listens=listen,
            reachable=lambda timeout: bus.reachable(timeout=timeout),
            nodes=lambda timeout: bus.nodes(timeout=timeout),
            ensure_started=self._ensure_started,
        )
        self.rooms = Rooms(
            bus=bus,
            history=self._backend.history,
            presence=self._backend.presence,
            hub=self.hub,
            config=self.realtime,
            node=self._current_node,
            deadline=deadline,
            listens=listen,
            ensure_started=self._ensure_started,
            # On memory:// its work belongs to other loops, too, and goes with a socket there.
            tasks=lambda: None if self._crosses_loops else self.tasks,
        )
        self.verifier = Verifier(
            self.service.store,
            self.hub,
            deadline=deadline,
            unverified_limit=self.realtime.unverified_limit,
            clock=boot_clock,
        )
        self._dispatch = Dispatch(
            cache=cache,
            hub=self.hub,
            rooms=self.rooms,
            acks=self.service.acks,
            tombstones=self.service.tombstones,
            bus=bus,
            node=self._current_node,
            verify=self.verifier.wake,
            recheck=self.verifier.recheck,
        )
        self._reach = Reach(
            service=self.service, bus=bus, node=self._current_node, encode_payload=encode_payload
        )
        self.origins = Origins(self.realtime.allowed_origins)
        self.endpoint = Endpoint(self)
        self.tasks: asyncio.TaskGroup | None = None
        """Owned by the supervisor while the cluster is started; ``None`` otherwise. For tasks of ``loop``."""
        self.loop: asyncio.AbstractEventLoop | None = None
        """The loop that started the cluster; ``None`` while it is not started."""
        self.drainer: Drainer | None = None
        """Holds SIGTERM back while this node is started; ``None`` where that is off or cannot be done."""
        self.draining = False
        """Whether ``drain`` was called: new sockets are closed at once, and ``ready`` is false."""
        self.warned_insecure = False
        self.lazy: LazyStart | None = LazyStart(self._start, self.__aexit__)
        """For servers without lifespan; ``None`` once the cluster has been started in another way."""
        self._failing: Failing = {}
        self._told_unstarted = False
        self._supervisor: asyncio.Task[None] | None = None
        self._stop: asyncio.Event | None = None

    # Handles

    def user(self, user_id: str) -> RemoteUser:
        """The sessions and sockets of a user, on all nodes.

        Raises:
            TypeError, ValueError: no user id, which is 1 to 255 printable characters.
        """
        return RemoteUser(self._reach, check_user(user_id))

    def session(self, handle: str) -> RemoteSession:
        """A session by its public handle.

        Raises:
            TypeError, ValueError: not a handle.
        """
        return RemoteSession(self._reach, check_handle(handle))

    def room(self, name: str) -> Room:
        """A room by its exact name, 1 to 255 characters. It exists as long as it has a member.

        Raises:
            ValueError: no valid room name.
        """
        return self.rooms.room(name)

    def accept(
        self,
        websocket: Any,
        *,
        subprotocol: str | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
        user_id: str | None = None,
        check_origin: bool = True,
    ) -> Acceptance:
        """Accept a WebSocket of the app's own and make it a member of the cluster: ``async with
        cluster.accept(ws) as connection``.

        ``websocket`` has ``scope``, ``receive`` and ``send`` (Starlette, FastAPI, Litestar), or is a tuple of
        the three. It may be accepted already. ``user_id`` names the user when the session does not. The
        connection is closed with 1000 on leaving, after what was sent, or is cut when the client has not read
        it within ``RealtimeConfig.close_timeout``.

        A page of another origin is refused with 403 as on the built-in endpoint
        (``RealtimeConfig.allowed_origins``). Then the body does not run, and the ``OSError`` that ends the
        call is an ordinary end for the middleware. ``check_origin=False`` leaves that check to the app.

        Raises:
            OSError: the origin is not allowed; the client has its answer.
            RuntimeError: no ``ClusterMiddleware`` with this cluster is around the app.
            TypeError, ValueError: no user id.
        """
        if user_id is not None:
            check_user(user_id)
        return Acceptance(
            websocket,
            self,
            subprotocol=subprotocol,
            headers=tuple(headers),
            user_id=user_id,
            check_origin=check_origin,
        )

    # Lifetime

    async def __aenter__(self) -> Self:
        """Start: returns when sessions can be read and messages arrive.

        Raises:
            StoreUnavailable, BusUnavailable: Redis cannot be reached, refuses us or is too old; says what and
                where.
            RuntimeError: already started, or not on asyncio.
        """
        lazy, self.lazy = self.lazy, None
        try:
            await self._start()
        except BaseException:
            self.lazy = lazy
            raise
        return self

    async def _start(self) -> None:
        loop = running_asyncio_loop()
        if self._supervisor is not None and not self._supervisor.done():
            raise RuntimeError("this cluster is already started")
        self._warn_of_siblings()
        self._new_node()
        self.draining = False
        started: asyncio.Future[None] = loop.create_future()
        # The one task that no group owns: it owns the group, so that start and stop may come from different
        # tasks.
        self._supervisor = loop.create_task(self._supervise(started), name="asgi-cluster supervisor")
        try:
            await asyncio.shield(started)
        except BaseException:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = None
            raise

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop: sockets are closed with 3001, the node is taken off the registry, connections are closed."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        if not supervisor.done():
            if self._stop is not None:
                self._stop.set()
            await asyncio.wait([supervisor])
        if not supervisor.cancelled() and (error := supervisor.exception()) is not None:
            raise error

    async def drain(self, seconds: float | timedelta) -> None:
        """Close this node's sockets with 3001, spread over ``seconds`` (or a ``timedelta``), so that their
        clients do not come back all at once.

        From now on ``ready`` is false, and new sockets are closed right after their handshake: clients of the
        official SDKs and of ``client.js`` try again with backoff, and find another node. Requests go on being
        answered.
        """
        seconds = in_seconds("seconds", seconds)
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, not {seconds!r}")
        self.draining = True
        sockets, _ = self.hub.load()
        logger.info("draining %d sockets over %g s", sockets, seconds)
        await self.hub.drain(seconds)

    async def _drain_on_signal(self) -> None:
        # A few sockets may come back at once: a restart should not wait for them.
        sockets, _ = self.hub.load()
        most = 0.0 if reloads() or self.hub.reloads() else self.realtime.drain or 0.0
        await self.drain(min(most, sockets * _DRAIN_EACH))

    async def _supervise(self, started: asyncio.Future[None]) -> None:
        self._stop = asyncio.Event()
        node = self._current_node()
        try:
            async with (
                self._backend.open(node, self._dispatch, listen=self.listen, failing=self._failing),
                asyncio.TaskGroup() as tasks,
            ):
                await self.rooms.retention.start()
                self.tasks, self.loop = tasks, asyncio.get_running_loop()
                with ExitStack() as stack:
                    if self.realtime.drain and self.listen:
                        level = logging.INFO if self.realtime.drain == DEFAULT_DRAIN else logging.WARNING
                        self.drainer = stack.enter_context(
                            draining_on_sigterm(self._drain_on_signal, tasks, level=level)
                        )
                    works = {
                        "verification": self.verifier.run,
                        "tombstones": self.service.tombstones.run,
                        "room rules": self.rooms.retention.run,
                    }
                    background = [
                        tasks.create_task(
                            keep_running(work, name=name, failing=self._failing), name=f"asgi-cluster {name}"
                        )
                        for name, work in works.items()
                    ]
                    logger.info("node %s started", node)
                    started.set_result(None)
                    try:
                        await self._stop.wait()
                    finally:
                        for task in background:
                            task.cancel()
                        self.tasks = self.loop = self.drainer = None
                        await self.hub.shutdown(timeout=self.realtime.close_timeout)
                logger.info("node %s stopped", node)
        except BaseException as error:
            if started.done():
                if self.lazy is not None and isinstance(error, asyncio.CancelledError):
                    await self._sign_off()
                if isinstance(error, Exception):
                    logger.critical("node %s has ended with an unexpected error", node, exc_info=error)
                raise
            # Every task group on the way has wrapped it; the caller that starts the cluster gets the error
            # itself.
            started.set_exception(_innermost(error))
            if not isinstance(error, Exception):
                raise
        finally:
            self._stop = None

    async def _sign_off(self) -> None:
        # The loop ends and has cancelled everything, the connections too: sign off over new ones.
        try:
            async with (
                asyncio.timeout(self.deadline),
                self._backend.open(self._current_node(), self._dispatch, listen=self.listen),
            ):
                logger.info("node %s stopped", self._node)
        except (ClusterError, TimeoutError) as error:
            reason = str(error) or f"no answer within {self.deadline:g} s"
            logger.info("node %s could not sign off: %s", self._node, reason)

    @property
    def started(self) -> bool:
        """Whether it was started and not stopped."""
        return self.tasks is not None

    @property
    def needs_start(self) -> bool:
        """True with Redis: outside of a request, the cluster has to be started before it is used. False with
        ``memory://``, which can be used without a start.
        """
        return self._backend.needs_start

    @property
    def _crosses_loops(self) -> bool:
        """Whether messages may arrive on another thread than a socket's loop (``memory://``)."""
        return self._backend.crosses_loops

    def _ensure_started(self, action: str) -> None:
        """Raises ``NotStarted`` when ``action`` needs a start, ``RuntimeError`` on another loop than the one
        that did it. Attaches a ``memory://`` node that was not started.

        A started ``memory://`` cluster could be used from any loop, and still refuses what Redis would
        refuse, so that tests find what production would. Once the loop that started it has stopped, any loop
        will do.
        """
        if self.tasks is not None:
            if not self._crosses_loops or (self.loop is not None and self.loop.is_running()):
                check_loop(self.loop)
            return
        running_asyncio_loop()
        if self._backend.needs_start:
            raise NotStarted(action)
        if not self._told_unstarted:
            self._told_unstarted = True
            logger.info(
                "memory:// is used without a start; with Redis that is NotStarted outside of requests"
            )
        self._warn_of_siblings()
        self._attach()

    def _warn_of_no_url(self) -> None:
        if self._alone and not self.listen:
            self._alone = False
            logger.warning(
                "listen=False without a URL: this cluster uses memory://, and its logouts and broadcasts "
                "reach no other process. Set ASGI_CLUSTER_URL, for example to redis://localhost:6379/0"
            )

    def _warn_of_siblings(self) -> None:
        # Once, and not only at construction: an app that is loaded before the fork has no siblings then.
        if self._alone and _has_siblings():
            self._alone = False
            logger.warning(
                "this is a worker process, and memory:// is not shared: each of several workers has "
                "sessions and rooms of its own. Set ASGI_CLUSTER_URL, for example to redis://localhost:6379/0"
            )

    def _attach(self) -> None:
        self._backend.attach(self._current_node(), self._dispatch, listen=self.listen)

    def _current_node(self) -> NodeId:
        return self._node or self._new_node()

    def _new_node(self) -> NodeId:
        # Made at start and not at construction: workers that are forked afterwards must not share a name.
        label = self._label or re.sub(r"[^A-Za-z0-9_.-]", "-", sockets.gethostname())[:64] or "node"
        self._node = NodeId(f"{label}-{os.getpid()}-{secrets.token_hex(4)}")
        return self._node

    # Observing

    @property
    def node(self) -> NodeId | None:
        """This node's id; ``None`` before it was first used."""
        return self._node

    @property
    def ready(self) -> bool:
        """Whether this node should get traffic.

        False before start, while draining, while background work has failed (``stats().failing``), after the
        cluster has ended with an error (logged as critical), and when the store answers and the heartbeat on
        the subscriber's connection does not. True, though degraded, when Redis does not answer at all: taking
        every node out for that would take anonymous traffic down too.
        """
        startable = self.started or (self._supervisor is None and not self._backend.needs_start)
        return startable and not self.draining and not self._failing and self._backend.ready

    def stats(self) -> ClusterStats:
        """A snapshot of this node; does no I/O."""
        return ClusterStats(
            node=self._node,
            ready=self.ready,
            failing=dict(self._failing.values()),
            cache=self.service.store.cache.stats(),
            bus=replace(self._backend.bus.stats(), malformed=self._dispatch.malformed),
            realtime=self.hub.stats(),
        )

    async def nodes(self) -> Sequence[NodeInfo]:
        """The registered nodes, by id. Raises ``StoreUnavailable``."""
        self._ensure_started("listing nodes")
        found = await self._backend.bus.nodes(timeout=self.deadline)
        return [found[node] for node in sorted(found)]

    def __repr__(self) -> str:
        state = "started" if self.started else "not started"
        return f"<Cluster {self._node or 'without node'}, {state}>"


def get_session(connection: HTTPConnection) -> Session:
    """The session of a request or WebSocket: anything with a ``scope``, or the scope itself. Also a FastAPI
    dependency.

    Raises:
        RuntimeError: no ``ClusterMiddleware`` is around this app.
        TypeError: ``connection`` has no ASGI scope.
    """
    scope = getattr(connection, "scope", connection)
    if not isinstance(scope, Mapping):
        raise TypeError(
            f"get_session takes a request, a WebSocket or an ASGI scope, not {described(connection)}: pass "
            "the object that the framework gives the handler"
        )
    state = ScopeState.of(scope)
    if state is None:
        raise RuntimeError("there is no session here: wrap the app in ClusterMiddleware(app, cluster)")
    return state.session


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _has_siblings() -> bool:
    workers = os.environ.get("WEB_CONCURRENCY", "")
    if workers.isdigit() and int(workers) > 1:
        return True
    # A worker of gunicorn is forked with the list of those that were forked before it. So all but the first
    # find one there.
    gunicorn = getattr(sys.modules.get("gunicorn.arbiter"), "Arbiter", None)
    return multiprocessing.parent_process() is not None or bool(getattr(gunicorn, "WORKERS", None))
