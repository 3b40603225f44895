"""The public facade, and where the parts of a node are put together."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from ssl import SSLContext
from typing import Any, Self

from asgi_cluster.arguments import expect, expect_callable
from asgi_cluster.arguments import seconds as in_seconds
from asgi_cluster.backends.choose import open_backend
from asgi_cluster.backends.port import Backend
from asgi_cluster.bus.bus import NodeInfo
from asgi_cluster.centrifuge.endpoint import Endpoint
from asgi_cluster.config import RealtimeConfig
from asgi_cluster.dispatch import Dispatch
from asgi_cluster.ids import NodeId, check_user
from asgi_cluster.node import Node
from asgi_cluster.remote import RemoteSession, RemoteUser, check_handle
from asgi_cluster.rooms.acceptance import Acceptance
from asgi_cluster.rooms.names import check_room
from asgi_cluster.rooms.room import Room
from asgi_cluster.rooms.rooms import Rooms
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.config import CacheConfig, CookieConfig, SessionConfig
from asgi_cluster.sessions.revalidation import Revalidator
from asgi_cluster.sessions.service import SessionService
from asgi_cluster.sockets.hub import Hub
from asgi_cluster.sockets.origin import Origins
from asgi_cluster.stats import ClusterStats
from asgi_cluster.supervisor import Supervisor
from asgi_cluster.workers import UnsharedMemory

__all__ = ["Cluster", "Parts"]

_WRAPPED: Mapping[type, str] = {
    CookieConfig: ": write SessionConfig(cookie=CookieConfig(…))",
    CacheConfig: ": write SessionConfig(cache=CacheConfig(…))",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a node is made of. For ``asgi_cluster.asgi`` alone: an app uses ``Cluster``."""

    node: Node
    backend: Backend
    hub: Hub
    service: SessionService
    rooms: Rooms
    revalidator: Revalidator
    dispatch: Dispatch
    origins: Origins
    endpoint: Endpoint
    supervisor: Supervisor
    realtime: RealtimeConfig
    identify: Callable[[Mapping[str, Any]], str | Awaitable[str | None] | None] | None


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
        realtime = realtime or RealtimeConfig()
        if not 0 < deadline <= sessions.cache.lease:
            raise ValueError(
                f"deadline must be above 0, at most the lease {sessions.cache.lease:g}, not {deadline!r}: "
                "a write whose outcome is unknown has to be settled before a cached read may be trusted again"
            )
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", prefix):
            raise ValueError(f"prefix must be 1 to 64 of A-Z a-z 0-9 _ . : -, not {prefix!r}")
        if node_label is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", node_label):
            raise ValueError(f"node_label must be 1 to 64 of A-Z a-z 0-9 _ . -, not {node_label!r}")
        stale_for = sessions.stale_for if sessions.on_store_error == "stale" else 0.0
        found = url or os.environ.get("ASGI_CLUSTER_URL")
        backend = open_backend(
            found or "memory://",
            prefix=prefix,
            lease_duration=sessions.cache.lease,
            rooms_url=rooms_url,
            ssl_context=ssl_context,
            credential_provider=credential_provider,
            wait_replicas=sessions.wait_replicas,
            stale_for=stale_for,
        )
        self._memory = UnsharedMemory(without_url=not found, listens=listen)
        node = Node(
            label=node_label,
            listens=listen,
            deadline=deadline,
            needs_start=backend.needs_start,
            crosses_loops=backend.crosses_loops,
            attach=self._attach,
        )
        cache = SessionCache(
            backend.bus.lease,
            ttl=sessions.cache.ttl,
            max_entries=sessions.cache.max_entries,
            stale_for=stale_for,
        )
        hub = Hub(outbox_bytes=realtime.outbox_bytes)
        service = SessionService(backend.store, cache, sessions, node=node, bus=backend.bus, sockets=hub)
        rooms = Rooms(
            bus=backend.bus,
            history=backend.history,
            presence=backend.presence,
            hub=hub,
            config=realtime,
            node=node,
        )
        revalidator = Revalidator(service.reader, hub, node=node, unverified_limit=realtime.unverified_limit)
        dispatch = Dispatch(
            cache=cache,
            hub=hub,
            rooms=rooms,
            acks=service.logouts.acks,
            tombstones=service.logouts.tombstones,
            bus=backend.bus,
            node=node,
            verify=revalidator.wake,
            recheck=revalidator.recheck,
        )
        origins = Origins(realtime.allowed_origins)
        self._parts = Parts(
            node=node,
            backend=backend,
            hub=hub,
            service=service,
            rooms=rooms,
            revalidator=revalidator,
            dispatch=dispatch,
            origins=origins,
            endpoint=Endpoint(realtime, node=node, hub=hub, rooms=rooms, origins=origins, cluster=self),
            supervisor=Supervisor(
                node,
                hub,
                realtime,
                connect=lambda: backend.open(node.id, dispatch, listen=listen, failing=node.failing),
                declare=rooms.retention.start,
                works={
                    "verification": revalidator.run,
                    "tombstones": service.logouts.tombstones.run,
                    "room rules": rooms.retention.run,
                },
            ),
            realtime=realtime,
            identify=identify,
        )

    def _attach(self) -> None:
        self._memory.look()
        parts = self._parts
        parts.backend.attach(parts.node.id, parts.dispatch, listen=parts.node.listens)

    # Handles

    def user(self, user_id: str) -> RemoteUser:
        """The sessions and sockets of a user, on all nodes.

        Raises:
            TypeError, ValueError: no user id, which is 1 to 255 printable characters.
        """
        return RemoteUser(self._parts.service, self._parts.backend.bus, check_user(user_id))

    def session(self, handle: str) -> RemoteSession:
        """A session by its public handle.

        Raises:
            TypeError, ValueError: not a handle.
        """
        return RemoteSession(self._parts.service, self._parts.backend.bus, check_handle(handle))

    def room(self, name: str) -> Room:
        """A room by its exact name, 1 to 255 characters. It exists as long as it has a member.

        Raises:
            ValueError: no valid room name.
        """
        return Room(self._parts.rooms, check_room(name))

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
        parts = self._parts
        return Acceptance(
            websocket,
            parts.rooms,
            parts.hub,
            parts.origins,
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
        self._memory.look()
        await self._parts.supervisor.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop: sockets are closed with 3001, the node is taken off the registry, connections are closed."""
        await self._parts.supervisor.stop()

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
        await self._parts.supervisor.drain(seconds)

    @property
    def started(self) -> bool:
        """Whether it was started and not stopped."""
        return self._parts.node.started

    @property
    def draining(self) -> bool:
        """Whether ``drain`` was called: new sockets are closed at once, and ``ready`` is false."""
        return self._parts.node.draining

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop that started the cluster; ``None`` while it is not started."""
        return self._parts.node.loop

    # Observing

    @property
    def node(self) -> NodeId | None:
        """This node's id; ``None`` before it was first used."""
        return self._parts.node.known_as

    @property
    def ready(self) -> bool:
        """Whether this node should get traffic.

        False before start, while draining, while background work has failed (``stats().failing``), after the
        cluster has ended with an error (logged as critical), and when the store answers and the heartbeat on
        the subscriber's connection does not. True, though degraded, when Redis does not answer at all: taking
        every node out for that would take anonymous traffic down too.
        """
        parts = self._parts
        node = parts.node
        startable = node.started or not (node.needs_start or parts.supervisor.ended)
        return startable and not node.draining and not node.failing and parts.backend.ready

    def stats(self) -> ClusterStats:
        """A snapshot of this node; does no I/O."""
        parts = self._parts
        return ClusterStats(
            node=parts.node.known_as,
            ready=self.ready,
            failing=dict(parts.node.failing.values()),
            cache=parts.service.cache.stats(),
            bus=replace(parts.backend.bus.stats(), malformed=parts.dispatch.malformed),
            realtime=parts.hub.stats(rooms=parts.rooms.count()),
        )

    async def nodes(self) -> Sequence[NodeInfo]:
        """The registered nodes, by id. Raises ``StoreUnavailable``."""
        node = self._parts.node
        node.ensure_started("listing nodes")
        found = await self._parts.backend.bus.nodes(timeout=node.deadline)
        return [found[node] for node in sorted(found)]

    def __repr__(self) -> str:
        state = "started" if self.started else "not started"
        return f"<Cluster {self.node or 'without node'}, {state}>"
