"""Rooms across the cluster: broadcast, history, presence; and what the bus brings for the members here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from typing import Any

from asgi_cluster.bus.messages import (
    Disconnect,
    Left,
    Message,
    PayloadKind,
    Published,
    encode,
)
from asgi_cluster.bus.room_bus import RoomBus
from asgi_cluster.codes import UnsubscribeCode
from asgi_cluster.config import RealtimeConfig
from asgi_cluster.exceptions import BusUnavailable, ClusterError
from asgi_cluster.ids import new_token
from asgi_cluster.node import Node
from asgi_cluster.rooms.delivery import Delivery
from asgi_cluster.rooms.history import HistoryStore, Page, Position, seal_envelope
from asgi_cluster.rooms.local_room import LocalRoom
from asgi_cluster.rooms.local_rooms import LocalRooms
from asgi_cluster.rooms.memberships import Memberships, client_info
from asgi_cluster.rooms.presence import PresenceStore, read_info
from asgi_cluster.rooms.presence_tracker import PresenceTracker
from asgi_cluster.rooms.retention import Kept, Retention
from asgi_cluster.rooms.rules import RoomRule, find_rule
from asgi_cluster.rooms.stream_runner import StreamRunner
from asgi_cluster.sockets.hub import Hub
from asgi_cluster.tasks import spawn

__all__ = ["Rooms"]

logger = logging.getLogger("asgi_cluster.realtime")

_HIGHEST = 1 << 53
"""Above every offset: the last integer up to which the numbers of a Redis script are exact."""


class Rooms:
    """All rooms of one cluster object."""

    def __init__(
        self,
        *,
        bus: RoomBus,
        history: HistoryStore,
        presence: PresenceStore,
        hub: Hub,
        config: RealtimeConfig,
        node: Node,
    ) -> None:
        self._bus = bus
        self._history = history
        self._presence = presence
        self._tracker = PresenceTracker(presence, bus, info=client_info, timeout=node.deadline)
        self._local = LocalRooms(bus, hub, crosses_loops=node.crosses_loops)
        self._config = config
        self.node = node
        self._delivery = Delivery(self._local)
        self.retention = Retention(config.rules, history, node=node)
        self.memberships = Memberships(
            node=node,
            rules=config.rules,
            rooms=self._local,
            presence=self._tracker,
            retention=self.retention,
            publish=self._send,
            stream=self._stream,
        )

    def rule(self, room: str) -> tuple[RoomRule, dict[str, str]] | None:
        """The rule for a room, and what its pattern's names stand for."""
        return find_rule(self._config.rules, room)

    # Publishing

    async def publish(
        self,
        room: str,
        kind: PayloadKind,
        data: bytes,
        *,
        exclude: str | None = None,
        key: str | None = None,
        idempotency_key: str | None = None,
        client: str | None = None,
        info: bytes | None = None,
    ) -> Position | None:
        """Hand an encoded payload to the bus. As ``Room.broadcast``."""
        self.node.ensure_started("broadcasting")
        if len(data) > self._config.max_broadcast_bytes:
            raise ValueError(
                f"a broadcast of {len(data)} bytes: max_broadcast_bytes is {self._config.max_broadcast_bytes}"
            )
        message = Published(
            kind,
            data,
            idempotency_key or new_token(),
            self.node.id,
            exclude=exclude,
            key=key,
            client=client,
            info=info,
        )
        payload = encode(message)
        local = self._config.on_bus_error == "local"
        if local:
            self._delivery.follow(message.id)
        try:
            timeout = await self.retention.refresh(self.node.deadline)
            kept = self.retention.of(room)
            if kept is None:
                if idempotency_key is not None:
                    raise ValueError(
                        f"idempotency_key needs a room with history, and no rule gives one to {room!r}"
                    )
                await self._bus.publish(room, seal_envelope(None, 0, payload), timeout=timeout)
                return None
            return await self._history.publish(
                room,
                payload,
                size=kept.size,
                ttl=kept.ttl,
                idempotency_key=idempotency_key,
                epoch=self.retention.epoch,
                timeout=timeout,
            )
        except BusUnavailable:
            if not local:
                raise
            if not self._delivery.followed(message.id):
                self._delivery.deliver_here(room, message)
            return None
        finally:
            if local:
                self._delivery.followed(message.id)

    async def read(
        self, room: str, *, limit: int | None, since: Position | None, reverse: bool = False
    ) -> Page:
        """A page of history. As ``Room.history``."""
        self.node.ensure_started("reading history")
        timeout = await self.retention.refresh(self.node.deadline)
        kept = self.retention.of(room)
        if kept is None:
            raise ValueError(f"no rule gives {room!r} a history, neither here nor on any node")
        # Redis fails on numbers of more than 64 bits, and no room has so many publications.
        if limit is not None:
            limit = min(limit, _HIGHEST)
        if since is not None and since.offset > _HIGHEST:
            since = Position(_HIGHEST, since.epoch)
        return await self._history.read(
            room,
            since=since,
            limit=limit,
            reverse=reverse,
            epoch=self.retention.epoch,
            ttl=kept.ttl,
            timeout=timeout,
        )

    async def present(self, room: str) -> Mapping[str, bytes]:
        """Connection ids, with their client info as JSON. As ``Room.presence``."""
        self._check_presence(room)
        found = await self._presence.members(room, timeout=self.node.deadline)
        # Entries go to clients as they are, so one that is malformed is left out.
        return {client: info for client, info in found.items() if read_info(info) is not None}

    async def presence_stats(self, room: str) -> tuple[int, int]:
        """Connections and distinct users. Raises as ``Room.presence``."""
        self._check_presence(room)
        return await self._presence.stats(room, timeout=self.node.deadline)

    def _check_presence(self, room: str) -> None:
        self.node.ensure_started("presence")
        found = self.rule(room)
        if found is None or not found[0].presence:
            raise ValueError(f"no rule gives {room!r} presence")

    async def expel(self, room: str, user: str | None) -> None:
        """As ``Room.disconnect``."""
        message = Disconnect(user, None, room, UnsubscribeCode.SERVER, "server unsubscribe", self.node.id)
        await self._send(room, message)

    async def _send(self, room: str, message: Message) -> None:
        self.node.ensure_started("sending to a room")
        await self._bus.publish(room, seal_envelope(None, 0, encode(message)), timeout=self.node.deadline)

    # Work in the background

    def _stream(self, local_room: LocalRoom, kept: Kept) -> StreamRunner:
        if local_room.stream is None:
            room = local_room.name

            def start(work: Coroutine[Any, Any, None]) -> None:
                self._start(local_room, work)

            local_room.stream = StreamRunner(
                room,
                history=self._history,
                size=kept.size,
                ttl=kept.ttl,
                timeout=self.node.deadline,
                epoch=lambda: self.retention.epoch,
                lease=lambda: self._bus.lease(room),
                deliver=lambda entry: self._delivery.deliver(local_room, entry.payload, entry.offset),
                lost=lambda: self._delivery.lost(local_room),
                spawn=start,
            )
        return local_room.stream

    def _start(self, local_room: LocalRoom | None, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` in the cluster's task group; where there is none, in that of a member's socket."""
        tasks = self.node.tasks
        # On memory:// the work belongs to other loops, too, and goes with a socket there.
        if tasks is not None and not self.node.crosses_loops:
            _spawn(tasks, work)
            return
        for found in self._local if local_room is None else (local_room,):
            for member in self._local.members(found):
                member.socket.call(_spawn, member.socket.tasks, work)
                return
        work.close()  # no member is here

    # Receiving

    def room_message(self, room: str, payload: bytes) -> None:
        self._delivery.receive(room, payload)

    def rooms_gap(self, rooms: frozenset[str]) -> None:
        for local_room in self._local:
            if local_room.stream is not None and local_room.name in rooms:
                local_room.stream.gap()

    def rooms_restored(self, rooms: frozenset[str]) -> None:
        for local_room in self._local:
            if local_room.stream is not None and local_room.name in rooms:
                local_room.stream.restored()
        self._start(None, self._tracker.restore(self._local.connections))

    def node_died(self, node: str, incarnation: str) -> None:
        """A node is dead, as the registry found: take its members out of the rooms that have members here."""
        for local_room in self._local:
            found = self.rule(local_room.name)
            if found is not None and found[0].presence:
                work = self._reap(local_room.name, node, incarnation, found[0].join_leave)
                self._start(local_room, work)

    async def _reap(self, room: str, node: str, incarnation: str, publish_leaves: bool) -> None:
        try:
            # Every node with members of the room does this; the one that removed an entry publishes the
            # leave.
            removed = await self._presence.reap(room, node, incarnation, timeout=self.node.deadline)
            for client, info in removed.items():
                if publish_leaves:
                    await self._send(room, Left(client, info))
        except ClusterError as error:
            logger.info("a dead node's presence could not be removed (%s)", type(error).__name__)

    def count(self) -> int:
        """Rooms with members here."""
        return len(self._local)

    def __repr__(self) -> str:
        return f"<Rooms, {len(self._local)} with members here>"


def _spawn(tasks: asyncio.TaskGroup, work: Coroutine[Any, Any, None]) -> None:
    try:
        spawn(tasks, work, name="asgi-cluster rooms")
    except RuntimeError:
        return  # the node is stopping
