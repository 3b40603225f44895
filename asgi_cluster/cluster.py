"""The public facade: one object that an app makes, wraps itself with, and calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from ssl import SSLContext
from typing import Any, Self

from asgi_cluster.arguments import seconds as in_seconds
from asgi_cluster.bus.stats import NodeInfo
from asgi_cluster.config import RealtimeConfig
from asgi_cluster.ids import NodeId, check_user
from asgi_cluster.options import Identify, Options
from asgi_cluster.parts import Parts
from asgi_cluster.remote import RemoteSession, RemoteUser, check_handle
from asgi_cluster.rooms.acceptance import Acceptance
from asgi_cluster.rooms.names import check_room
from asgi_cluster.rooms.room import Room
from asgi_cluster.sessions.config import SessionConfig
from asgi_cluster.stats import ClusterStats

__all__ = ["Cluster", "parts_of"]


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
        identify: Identify | None = None,
        sessions: SessionConfig | None = None,
        realtime: RealtimeConfig | None = None,
        ssl_context: SSLContext | None = None,
        credential_provider: Any = None,
    ) -> None:
        options = Options(
            url=url,
            prefix=prefix,
            node_label=node_label,
            listen=listen,
            deadline=in_seconds("deadline", deadline),
            rooms_url=rooms_url,
            identify=identify,
            sessions=SessionConfig() if sessions is None else sessions,
            realtime=RealtimeConfig() if realtime is None else realtime,
            ssl_context=ssl_context,
            credential_provider=credential_provider,
        )
        self._parts = Parts(options, self)

    # Handles

    def user(self, user_id: str) -> RemoteUser:
        """The sessions and sockets of a user, on all nodes.

        Raises:
            TypeError, ValueError: no user id, which is 1 to 255 printable characters.
        """
        return RemoteUser(self._parts.service, self._parts.backend.session_bus, check_user(user_id))

    def session(self, handle: str) -> RemoteSession:
        """A session by its public handle.

        Raises:
            TypeError, ValueError: not a handle.
        """
        return RemoteSession(self._parts.service, self._parts.backend.session_bus, check_handle(handle))

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
            StoreUnavailable, BusUnavailable: Redis cannot be reached, refuses the login or is too old; the
                text says what and where.
            RuntimeError: already started, or not on asyncio.
        """
        self._parts.memory.check()
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
        given = in_seconds("seconds", seconds)
        if not given >= 0:
            raise ValueError(f"seconds must be at least 0, not {given!r}")
        await self._parts.supervisor.drain(given)

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
        return self._parts.node.current_id

    @property
    def ready(self) -> bool:
        """Whether this node should get traffic.

        False before start, while draining, while background work has failed (``stats().failing``), after the
        cluster has ended with an error (logged as critical), and when the store answers and the heartbeat on
        the subscriber's connection does not. True, though degraded, when Redis does not answer at all: taking
        every node out for that would take anonymous traffic down too.
        """
        return self._parts.supervisor.ready

    def stats(self) -> ClusterStats:
        """A snapshot of this node; does no I/O."""
        parts = self._parts
        return ClusterStats(
            node=parts.node.current_id,
            ready=self.ready,
            failing=dict(parts.node.failing.values()),
            cache=parts.service.cache.stats(),
            bus=replace(parts.backend.stats(), malformed=parts.dispatch.malformed),
            realtime=parts.hub.stats(rooms=parts.rooms.count()),
        )

    async def nodes(self) -> Sequence[NodeInfo]:
        """The registered nodes, by id. Raises ``StoreUnavailable``."""
        node = self._parts.node
        node.ensure_started("listing nodes")
        found = await self._parts.backend.session_bus.nodes(timeout=node.deadline)
        return [found[each] for each in sorted(found)]

    def __repr__(self) -> str:
        state = "started" if self.started else "not started"
        return f"<Cluster {self.node or 'without node'}, {state}>"


def parts_of(cluster: Cluster) -> Parts:
    """What ``cluster`` is made of. For ``asgi_cluster.asgi`` alone."""
    return cluster._parts
