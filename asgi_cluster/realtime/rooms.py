"""Rooms across the cluster: broadcast, history, presence; and what the bus brings for the members here."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from asgi_cluster.bus.bus import Bus
from asgi_cluster.bus.messages import (
    Disconnect,
    Joined,
    Left,
    MalformedMessage,
    Message,
    NodeDied,
    PayloadKind,
    Published,
    decode,
    encode,
)
from asgi_cluster.config import RealtimeConfig
from asgi_cluster.exceptions import BusUnavailable, ClusterError
from asgi_cluster.ids import NodeId, new_token
from asgi_cluster.realtime.attendance import Attendance
from asgi_cluster.realtime.audience import Audience
from asgi_cluster.realtime.connection import Connection
from asgi_cluster.realtime.history import Entry, HistoryStore, Page, Position, open_envelope, seal_envelope
from asgi_cluster.realtime.hub import Hub
from asgi_cluster.realtime.packet import Packet
from asgi_cluster.realtime.payload import encode_payload
from asgi_cluster.realtime.presence import PresenceStore
from asgi_cluster.realtime.protocol import ClientInfo, UnsubscribeCode, encode_push
from asgi_cluster.realtime.publications import encode_publication
from asgi_cluster.realtime.room import Publication, Room, RoomHistory, RoomMember
from asgi_cluster.realtime.rules import (
    Connected,
    ConnectRequest,
    RoomRequest,
    RoomRule,
    check_room,
    find_rule,
)
from asgi_cluster.realtime.sequence import Sequence as RoomSequence
from asgi_cluster.realtime.socket import Socket
from asgi_cluster.tasks import spawn

__all__ = [
    "ConnectRequest",
    "Connected",
    "Entered",
    "Publication",
    "Room",
    "RoomHistory",
    "RoomMember",
    "RoomRequest",
    "RoomRule",
    "Rooms",
    "encode_payload",
]

logger = logging.getLogger("asgi_cluster.realtime")

_IDS_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Entered:
    """How a connection entered a room: where the room stands (``None``: no history), and what was missed
    (``None``: not known).
    """

    position: Position | None
    missed: Sequence[Entry] | None


class Rooms:
    """All rooms of one cluster object."""

    def __init__(
        self,
        *,
        bus: Bus,
        history: HistoryStore,
        presence: PresenceStore,
        hub: Hub,
        config: RealtimeConfig,
        node: Callable[[], NodeId],
        deadline: float,
        ensure_started: Callable[[str], None],
    ) -> None:
        self._bus = bus
        self._history = history
        self._attendance = Attendance(presence, bus, info=self.client_info, timeout=deadline)
        self._hub = hub
        self._config = config
        self._node = node
        self._deadline = deadline
        self._ensure_started = ensure_started
        bus.on_dead = self.report_dead
        self._local_ids: OrderedDict[str, None] = OrderedDict()
        self._complained: set[str] = set()

    def room(self, name: str) -> Room:
        """See ``Cluster.room``."""
        return Room(self, check_room(name))

    def rule(self, room: str) -> tuple[RoomRule, dict[str, str]] | None:
        """The rule for a room, and what its pattern's names stand for."""
        return find_rule(self._config.rules, room)

    # Out

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
        self._ensure_started("broadcasting")
        if len(data) > self._config.max_broadcast_bytes:
            raise ValueError(
                f"a broadcast of {len(data)} bytes: max_broadcast_bytes is {self._config.max_broadcast_bytes}"
            )
        message = Published(
            kind,
            data,
            idempotency_key or new_token(),
            self._node(),
            exclude=exclude,
            key=key,
            client=client,
            info=info,
        )
        found = self.rule(room)
        history = 0 if found is None else found[0].history
        if idempotency_key is not None and not history:
            raise ValueError(f"idempotency_key needs a room with history, and no rule gives one to {room!r}")
        payload = encode(message)
        try:
            if found is None or not history:
                await self._bus.publish_room(room, seal_envelope(None, 0, payload), timeout=self._deadline)
                return None
            return await self._history.publish(
                room,
                payload,
                size=history,
                ttl=found[0].history_ttl,
                idempotency_key=idempotency_key,
                epoch=new_token(),
                timeout=self._deadline,
            )
        except BusUnavailable:
            if self._config.on_bus_error != "local":
                raise
            self._publish_here(room, message)
            return None

    def _publish_here(self, room: str, message: Published) -> None:
        # It may have reached the bus after all, and must not be delivered twice.
        self._local_ids[message.id] = None
        if len(self._local_ids) > _IDS_KEPT:
            self._local_ids.popitem(last=False)
        audience = self._hub.audience(room)
        if audience is not None:
            self._deliver_published(audience, message, None, local=True)

    async def read(
        self, room: str, *, limit: int | None, since: Position | None, reverse: bool = False
    ) -> Page:
        """A page of history. As ``Room.history``."""
        self._ensure_started("reading history")
        found = self.rule(room)
        if found is None or not found[0].history:
            raise ValueError(f"no rule gives {room!r} a history")
        return await self._history.read(
            room,
            since=since,
            limit=limit,
            reverse=reverse,
            epoch=new_token(),
            ttl=found[0].history_ttl,
            timeout=self._deadline,
        )

    async def present(self, room: str) -> Mapping[str, bytes]:
        """Connection ids, with their client info as JSON. As ``Room.presence``."""
        self._check_presence(room)
        return await self._attendance.members(room)

    async def presence_stats(self, room: str) -> tuple[int, int]:
        """Connections and distinct users. Raises as ``Room.presence``."""
        self._check_presence(room)
        return await self._attendance.stats(room)

    def _check_presence(self, room: str) -> None:
        self._ensure_started("presence")
        found = self.rule(room)
        if found is None or not found[0].presence:
            raise ValueError(f"no rule gives {room!r} presence")

    async def count_in(self, room: str, connection: Connection) -> int:
        """Enter a counting room (presence, and nothing else); how many are in it. Raises
        ``BusUnavailable``.
        """
        await self._attendance.appear(connection, room)
        connections, _ = await self._attendance.stats(room)
        return connections

    async def count_out(self, connection: Connection) -> None:
        """Leave the counting rooms."""
        counting = [room for room in connection.present if room not in connection.rooms]
        await self._attendance.vanish_everywhere(connection, counting)

    async def expel(self, room: str, user: str | None) -> None:
        """As ``Room.disconnect``."""
        message = Disconnect(user, None, room, UnsubscribeCode.SERVER, "server unsubscribe", self._node())
        await self._send(room, message)

    async def _send(self, room: str, message: Message) -> None:
        self._ensure_started("sending to a room")
        await self._bus.publish_room(room, seal_envelope(None, 0, encode(message)), timeout=self._deadline)

    # Members

    async def enter(self, connection: Connection, room: str, *, since: Position | None = None) -> Entered:
        """Make ``connection`` a member. Nothing is delivered to it before the return, and nothing missed
        after it.

        Raises:
            BusUnavailable, StoreUnavailable: not entered.
        """
        self._ensure_started("joining a room")
        already = connection.rooms.get(room)
        if already is not None:
            return Entered(None if already.sequence is None else already.sequence.last, None)
        found = self.rule(room)
        rule = None if found is None else found[0]
        audience = await self._hub.hold(room)
        try:
            if rule is not None and rule.presence:
                await self._attendance.appear(connection, room)
            missed: Sequence[Entry] | None = None
            position: Position | None = None
            if rule is not None and rule.history:
                missed, position = await self._sequence(audience, rule).recover(since)
        except BaseException:
            self._release(audience)
            await self._attendance.vanish(connection, room)
            raise
        # No await from here to the return: what is delivered after this goes to this member too.
        if rule is not None:
            audience.slow = rule.slow
        if connection.outbox.closed or room in connection.rooms:
            self._release(audience)
        else:
            connection.rooms[room] = audience
            audience.attach(connection)
            if rule is not None and rule.join_leave:
                connection.announced.add(room)
                self._tell(connection, room, Joined(connection.id, self.client_info(connection)))
        return Entered(position, missed)

    async def leave(self, connection: Connection, room: str) -> bool:
        """End a membership; False when there was none."""
        left = self._drop(connection, room)
        await self._attendance.vanish(connection, room)
        return left

    async def leave_all(self, connection: Connection) -> None:
        """The connection is over."""
        for room in {*connection.rooms, *connection.announced}:
            self._drop(connection, room)
        await self._attendance.vanish_everywhere(connection, tuple(connection.present))

    def _drop(self, connection: Connection, room: str) -> bool:
        if room in connection.announced:
            # Also when the hub has taken the connection out already: who was told of a join is told of the
            # leave.
            connection.announced.discard(room)
            self._tell(connection, room, Left(connection.id, self.client_info(connection)))
        audience = connection.rooms.pop(room, None)
        if audience is None:
            return False
        audience.detach(connection)
        self._release(audience)
        return True

    def _release(self, audience: Audience) -> None:
        self._hub.release(audience)
        if audience.holds == 0 and audience.sequence is not None:
            audience.sequence.close()

    def _tell(self, connection: Connection, room: str, message: Message) -> None:
        async def tell() -> None:
            try:
                await self._send(room, message)
            except ClusterError as error:
                logger.debug("a join or leave was not told (%s)", type(error).__name__)

        try:
            spawn(connection.socket.tasks, tell(), name="asgi-cluster join or leave")
        except RuntimeError:
            return  # the node is stopping: the registry's cleaner tells for it

    def client_info(self, connection: Connection) -> bytes:
        """What others may know of a connection, as JSON."""
        info = ClientInfo(user=connection.user_id or "", client=connection.id)
        if connection.info is not None:
            info = msgspec.structs.replace(info, conn_info=msgspec.Raw(msgspec.json.encode(connection.info)))
        return msgspec.json.encode(info)

    def _sequence(self, audience: Audience, rule: RoomRule) -> RoomSequence:
        if audience.sequence is None:
            room = audience.name

            def start(work: Coroutine[Any, Any, None]) -> None:
                if not self._start(audience, work):
                    work.close()

            audience.sequence = RoomSequence(
                room,
                history=self._history,
                size=rule.history,
                ttl=rule.history_ttl,
                timeout=self._deadline,
                lease=lambda: self._bus.room_lease(room),
                deliver=lambda entry: self._deliver_entry(audience, entry),
                lost=lambda: self._lost(audience),
                spawn=start,
            )
        return audience.sequence

    def _start(self, audience: Audience, work: Coroutine[Any, Any, None]) -> bool:
        for member in self._hub.members(audience):
            member.socket.call(_spawn, member.socket, work)
            return True
        return False

    def _lost(self, audience: Audience) -> None:
        """Publications are lost for the members here: they are told, and come back for what there is."""
        members = self._hub.members(audience)
        logger.warning(
            "publications of a room were lost for its %d members here: they are told", len(members)
        )
        for member in members:
            member.socket.call(member.lost, audience.name)

    # In

    def receive(self, room: str, payload: bytes) -> None:
        """What the bus brought for a room. Raises nothing: the bus's reader has others to serve."""
        audience = self._hub.audience(room)
        if audience is not None:
            try:
                self._receive(audience, payload)
            except Exception:
                logger.exception("a room message could not be delivered")

    def _receive(self, audience: Audience, payload: bytes) -> None:
        try:
            position, previous, body = open_envelope(payload)
        except ValueError:
            self._complain("a room message without envelope arrived (another version?)")
            return
        if position is None:
            self._deliver(audience, body)
        elif audience.sequence is None:
            if not any(True for _ in self._hub.members(audience)):
                return  # somebody is about to enter, and reads history after this
            self._complain("a room has history on another node and none here: the nodes' rules differ")
            self._deliver(audience, body)
        else:
            audience.sequence.receive(position, previous, body)

    def _complain(self, what: str) -> None:
        if what not in self._complained:
            self._complained.add(what)
            logger.warning("%s", what)

    def _deliver_entry(self, audience: Audience, entry: Entry) -> None:
        self._deliver(audience, entry.payload, entry.offset)

    def _deliver(self, audience: Audience, body: bytes, offset: int | None = None) -> None:
        try:
            message = decode(body)
        except MalformedMessage:
            self._complain("a room message could not be decoded (another version?)")
            return
        match message:
            case Published():
                if message.id in self._local_ids:
                    del self._local_ids[message.id]
                    return
                self._deliver_published(audience, message, offset)
            case Joined() | Left():
                name = "join" if isinstance(message, Joined) else "leave"
                push = Packet(encode_push(name, {"info": msgspec.Raw(message.info)}, channel=audience.name))
                audience.deliver(None, push)
            case Disconnect():
                for member in self._hub.members(audience):
                    if message.user is None or member.user_id == message.user:
                        member.socket.call(member.expelled, audience.name, message.code, message.reason)
            case _:
                self._complain("a message arrived in a room that does not belong in one")

    def _deliver_published(
        self, audience: Audience, message: Published, offset: int | None, *, local: bool = False
    ) -> None:
        bare = Packet(message.data, binary=message.kind == "b") if audience.bare else None
        encoded = encode_publication(audience.name, message, offset, local=local) if audience.pushed else None
        push = None if encoded is None else Packet(encoded)
        audience.deliver(bare, push, key=message.key, exclude=message.exclude)

    def gap(self, rooms: frozenset[str] | None) -> None:
        """Publications may have been missed."""
        for audience in self._hub.audiences():
            if audience.sequence is not None and (rooms is None or audience.name in rooms):
                audience.sequence.gap()

    def restored(self, rooms: frozenset[str] | None) -> None:
        """What was missed can be read now."""
        for audience in self._hub.audiences():
            if audience.sequence is not None and (rooms is None or audience.name in rooms):
                audience.sequence.restored()
        self._somewhere(self._attendance.restore(self._hub.connections))

    def node_died(self, node: str, incarnation: str) -> None:
        """A node is dead, as the registry found: take its people out of the rooms that have members here."""
        for audience in self._hub.audiences():
            found = self.rule(audience.name)
            if found is not None and found[0].presence:
                work = self._reap(audience.name, node, incarnation, found[0].join_leave)
                if not self._start(audience, work):
                    work.close()

    async def _reap(self, room: str, node: str, incarnation: str, tell: bool) -> None:
        try:
            # Every node with members here asks; the one that removed an entry tells that it is gone.
            for client, info in (await self._attendance.reap(room, node, incarnation)).items():
                if tell:
                    await self._send(room, Left(client, info))
        except ClusterError as error:
            logger.info("a dead node's presence could not be removed (%s)", type(error).__name__)

    def report_dead(self, node: str, incarnation: str) -> None:
        """This node's registry removed a dead node: every node is told, because each knows its own rooms."""
        payload = encode(NodeDied(node, incarnation, self._node()))
        self._somewhere(self._bus.publish_bucket(0, payload, timeout=self._deadline))

    def _somewhere(self, work: Coroutine[Any, Any, None]) -> None:
        for audience in self._hub.audiences():
            if self._start(audience, work):
                return
        # Without a room with members here there is nobody whose presence could be at stake.
        work.close()

    def __repr__(self) -> str:
        return f"<Rooms, {len(self._hub.audiences())} with members here>"


def _spawn(socket: Socket, work: Coroutine[Any, Any, None]) -> None:
    try:
        spawn(socket.tasks, work, name="asgi-cluster rooms")
    except RuntimeError:
        return  # the node is stopping
