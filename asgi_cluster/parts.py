"""The composition root: what a node is made of, and which part is given which."""

from __future__ import annotations

import os
from typing import Any

from asgi_cluster.backends.choose import open_backend
from asgi_cluster.centrifuge.endpoint import Endpoint
from asgi_cluster.dispatch import Dispatch
from asgi_cluster.lifetime.supervisor import Supervisor
from asgi_cluster.node import Node
from asgi_cluster.options import Options
from asgi_cluster.rooms.rooms import Rooms
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.revalidation import Revalidator
from asgi_cluster.sessions.service import SessionService
from asgi_cluster.sockets.hub import Hub
from asgi_cluster.sockets.origin import Origins
from asgi_cluster.workers import UnsharedMemory

__all__ = ["Parts"]


class Parts:
    """What one ``Cluster`` is made of. Connects to nothing.

    ``cluster`` is only handed on, to what gives it to an app (``Connection.cluster``).

    Raises:
        ValueError: no backend for this URL.
    """

    def __init__(self, options: Options, cluster: Any) -> None:
        sessions, realtime = options.sessions, options.realtime
        stale_for = sessions.stale_for if sessions.on_store_error == "stale" else 0.0
        url = options.url or os.environ.get("ASGI_CLUSTER_URL")
        self.realtime = realtime
        self.identify = options.identify
        self.backend = open_backend(
            url or "memory://",
            prefix=options.prefix,
            lease_duration=sessions.cache.lease,
            rooms_url=options.rooms_url,
            ssl_context=options.ssl_context,
            credential_provider=options.credential_provider,
            wait_replicas=sessions.wait_replicas,
            stale_for=stale_for,
        )
        self.memory = UnsharedMemory(without_url=not url, listens=options.listen)
        self.node = Node(
            label=options.node_label,
            listens=options.listen,
            deadline=options.deadline,
            needs_start=self.backend.needs_start,
            attach=self._attach,
        )
        self.hub = Hub(outbox_bytes=realtime.outbox_bytes)
        self.origins = Origins(realtime.allowed_origins)
        cache = SessionCache(
            self.backend.session_bus.lease,
            ttl=sessions.cache.ttl,
            max_entries=sessions.cache.max_entries,
            stale_for=stale_for,
        )
        self.service = SessionService(
            self.backend.store,
            cache,
            sessions,
            node=self.node,
            bus=self.backend.session_bus,
            sockets=self.hub,
        )
        self.rooms = Rooms(
            bus=self.backend.room_bus,
            history=self.backend.history,
            presence=self.backend.presence,
            hub=self.hub,
            config=realtime,
            node=self.node,
        )
        self.revalidator = Revalidator(
            self.service.reader, self.hub, node=self.node, unverified_limit=realtime.unverified_limit
        )
        self.dispatch = Dispatch(
            cache=cache,
            hub=self.hub,
            rooms=self.rooms,
            acks=self.service.logouts.acks,
            tombstones=self.service.logouts.tombstones,
            bus=self.backend.session_bus,
            node=self.node,
            revalidator=self.revalidator,
        )
        self.endpoint = Endpoint(
            realtime,
            node=self.node,
            hub=self.hub,
            rooms=self.rooms,
            origins=self.origins,
            cluster=cluster,
        )
        self.supervisor = Supervisor(
            self.node,
            backend=self.backend,
            dispatch=self.dispatch,
            hub=self.hub,
            rooms=self.rooms,
            revalidator=self.revalidator,
            tombstones=self.service.logouts.tombstones,
            config=realtime,
        )

    def _attach(self) -> None:
        self.memory.check()
        self.backend.attach(self.node, self.dispatch, self.rooms)
