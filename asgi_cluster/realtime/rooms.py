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
    PayloadKind,
    Published,
    decode,
    encode,
)
from asgi_cluster.config import RealtimeConfig
from asgi_cluster.exceptions import BusUnavailable, ClusterError
from asgi_cluster.ids import NodeId, new_token
from asgi_cluster.realtime.connection import Connection
from asgi_cluster.realtime.history import Entry, HistoryStore, Page, Position, open_envelope, seal_envelope
from asgi_cluster.realtime.hub import Audience, Hub
from asgi_cluster.realtime.outbox import Packet
from asgi_cluster.realtime.payload import decode_payload, encode_payload
from asgi_cluster.realtime.presence import PresenceStore
from asgi_cluster.realtime.protocol import ClientInfo, Pub, UnsubscribeCode, encode_push, to_json
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
    "pub_of",
]

logger = logging.getLogger("asgi_cluster.realtime")

_IDS_KEPT = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """One message of a room's history. ``data`` is what was broadcast: ``str``, ``bytes`` or a JSON value."""

    data: Any
    offset: int
    client: str | None = None
    """The id of the connection that published it; ``None``: the server."""
    user_id: str | None = None
    """Whom that connection belonged to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomHistory:
    """Publications, and where the room stood when they were read."""

    publications: Sequence[Publication]
    offset: int
    epoch: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomMember:
    """A connection that is in a room with presence, somewhere in the cluster."""

    connection_id: str
    user_id: str | None
    info: Any = None
    """What the ``connect`` hook said of it (``Connected.info``)."""


@dataclass(frozen=True, slots=True)
class Entered:
    """How a connection entered a room: where the room stands (``None``: no history), and what was missed
    (``None``: not known).
    """

    position: Position | None
    missed: Sequence[Entry] | None


class Room:
    """A room by its name, whoever is in it. Get one from ``cluster.room``."""

    __slots__ = ("_rooms", "name")

    def __init__(self, rooms: Rooms, name: str) -> None:
        self._rooms = rooms
        self.name = name

    async def broadcast(
        self,
        data: Any,
        *,
        exclude: Connection | str | None = None,
        key: str | None = None,
        idempotency_key: str | None = None,
    ) -> Position | None:
        """Send ``data`` to every member on every node: one round trip.

        The app's own sockets get ``str`` and JSON values as text and ``bytes`` as binary, bare. Clients of
        the endpoint get JSON; ``bytes`` reach them as a base64 string. In a room with history it is
        remembered, and its position returned; elsewhere it is delivered at most once, and ``None`` returned.
        All nodes see one order.

        Args:
            exclude: a connection, or its id, that does not get it now. Recovery returns it all the same.
            key: with ``slow="latest"``, the last message of each key is kept for a slow client.
            idempotency_key: broadcasts with the same key within five minutes are one message. Needs a room
            with history.

        Raises:
            BusUnavailable: it could not be handed to the bus.
            TypeError, ValueError: ``data`` cannot be encoded, or is longer than ``max_broadcast_bytes``.
        """
        kind, payload = encode_payload(data)
        excluded = exclude.id if isinstance(exclude, Connection) else exclude
        return await self._rooms.publish(
            self.name, kind, payload, exclude=excluded, key=key, idempotency_key=idempotency_key
        )

    async def history(
        self, limit: int | None = None, since: Position | None = None, reverse: bool = False
    ) -> RoomHistory:
        """What the room remembers: after ``since`` (``None``: from the oldest), at most ``limit`` (``None``:
        all).

        ``reverse``: the newest first. Raises ``BusUnavailable``, and ``ValueError`` when no rule gives the
        room a history.
        """
        if limit is not None and limit < 0:
            raise ValueError(f"limit must be at least 0, or None, not {limit!r}")
        page = await self._rooms.read(self.name, limit=limit, since=since, reverse=reverse)
        publications = [found for entry in page.entries if (found := _publication(entry)) is not None]
        return RoomHistory(publications=publications, offset=page.top.offset, epoch=page.top.epoch)

    async def presence(self) -> Sequence[RoomMember]:
        """Who is in the room, on every node. Raises ``BusUnavailable``; ``ValueError`` when no rule gives it
        presence.
        """
        members = await self._rooms.present(self.name)
        found = []
        for connection, encoded in members.items():
            info = msgspec.json.decode(encoded)
            found.append(
                RoomMember(
                    connection_id=connection, user_id=info.get("user") or None, info=info.get("conn_info")
                )
            )
        return found

    async def disconnect(self, *, user: str | None = None) -> None:
        """Take a user (``None``: everybody) out of the room on every node; the connections stay open. Raises
        ``BusUnavailable``.
        """
        await self._rooms.expel(self.name, user)

    def __repr__(self) -> str:
        return f"<Room {self.name!r}>"


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
        self._presence = presence
        self._hub = hub
        self._config = config
        self._node = node
        self._deadline = deadline
        self._ensure_started = ensure_started
        self._local_ids: OrderedDict[str, None] = OrderedDict()
        self._ghosts: set[tuple[str, str]] = set()
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
        return await self._presence.members(room, timeout=self._deadline)

    async def presence_stats(self, room: str) -> tuple[int, int]:
        """Connections and distinct users. Raises as ``Room.presence``."""
        self._check_presence(room)
        return await self._presence.stats(room, timeout=self._deadline)

    def _check_presence(self, room: str) -> None:
        self._ensure_started("presence")
        found = self.rule(room)
        if found is None or not found[0].presence:
            raise ValueError(f"no rule gives {room!r} presence")

    async def count_in(self, room: str, connection: Connection) -> int:
        """Enter a counting room (presence, and nothing else); how many are in it."""
        await self._appear(connection, room)
        connections, _ = await self._presence.stats(room, timeout=self._deadline)
        return connections

    async def count_out(self, connection: Connection) -> None:
        """Leave the counting rooms."""
        for room in [room for room in connection.present if room not in connection.rooms]:
            await self._vanish(connection, room)

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
                await self._appear(connection, room)
            missed: Sequence[Entry] | None = None
            position: Position | None = None
            if rule is not None and rule.history:
                missed, position = await self._sequence(audience, rule).recover(since)
        except BaseException:
            self._release(audience)
            await self._vanish(connection, room)
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
                self._tell(connection, room, Joined(connection.id, self.client_info(connection)))
        return Entered(position, missed)

    async def leave(self, connection: Connection, room: str) -> bool:
        """End a membership; False when there was none."""
        left = self._drop(connection, room)
        await self._vanish(connection, room)
        return left

    async def leave_all(self, connection: Connection) -> None:
        """The connection is over."""
        for room in list(connection.rooms):
            self._drop(connection, room)
        for room in list(connection.present):
            await self._vanish(connection, room)

    def _drop(self, connection: Connection, room: str) -> bool:
        audience = connection.rooms.pop(room, None)
        if audience is None:
            return False
        audience.detach(connection)
        self._release(audience)
        found = self.rule(room)
        if found is not None and found[0].join_leave:
            self._tell(connection, room, Left(connection.id, self.client_info(connection)))
        return True

    def _release(self, audience: Audience) -> None:
        self._hub.release(audience)
        if audience.holds == 0 and audience.sequence is not None:
            audience.sequence.close()

    async def _appear(self, connection: Connection, room: str) -> None:
        connection.present.add(room)  # before: an entry whose reply was lost has to go, too
        await self._presence.enter(room, connection.id, self.client_info(connection), timeout=self._deadline)

    async def _vanish(self, connection: Connection, room: str) -> None:
        if room not in connection.present:
            return
        connection.present.discard(room)
        try:
            await self._presence.leave(room, connection.id, timeout=self._deadline)
        except ClusterError:
            self._ghosts.add((room, connection.id))  # taken away when the bus is back

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
                self._start(audience, work)

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

    def _start(self, audience: Audience, work: Coroutine[Any, Any, None]) -> None:
        for member in self._hub.members(audience):
            socket = member.socket
            socket.call(_spawn, socket, work)
            return
        work.close()

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
        push = Packet(_push(audience.name, message, offset, local=local)) if audience.pushed else None
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
        ghosts, self._ghosts = self._ghosts, set()
        for audience in self._hub.audiences():
            if ghosts:
                self._start(audience, self._bury(ghosts))
                return
        self._ghosts |= ghosts

    async def _bury(self, ghosts: set[tuple[str, str]]) -> None:
        for room, connection in ghosts:
            try:
                await self._presence.leave(room, connection, timeout=self._deadline)
            except ClusterError:
                self._ghosts.add((room, connection))

    def __repr__(self) -> str:
        return f"<Rooms, {len(self._hub.audiences())} with members here>"


def _spawn(socket: Socket, work: Coroutine[Any, Any, None]) -> None:
    try:
        spawn(socket.tasks, work, name="asgi-cluster repair")
    except RuntimeError:
        return  # the node is stopping


def pub_of(entry: Entry) -> Pub | None:
    """A remembered publication as clients get it; ``None`` when it cannot be read."""
    message = _published(entry)
    if message is None:
        return None
    return _pub(message, entry.offset)


def _pub(message: Published, offset: int | None) -> Pub:
    pub = Pub(to_json(message.kind, message.data))
    if message.info is not None:
        pub = msgspec.structs.replace(pub, info=msgspec.Raw(message.info))
    return pub if offset is None else msgspec.structs.replace(pub, offset=offset)


def _push(room: str, message: Published, offset: int | None, *, local: bool) -> bytes:
    pub = _pub(message, offset)
    if local:
        pub = msgspec.structs.replace(pub, tags={"delivery": "local"})
    return encode_push("pub", pub, channel=room)


def _published(entry: Entry) -> Published | None:
    try:
        message = decode(entry.payload)
    except MalformedMessage:
        logger.warning("a remembered publication cannot be decoded (another version?)")
        return None
    return message if isinstance(message, Published) else None


def _publication(entry: Entry) -> Publication | None:
    message = _published(entry)
    if message is None:
        return None
    user = None
    if message.info is not None:
        user = msgspec.json.decode(message.info).get("user") or None
    return Publication(
        data=decode_payload(message.kind, message.data),
        offset=entry.offset,
        client=message.client,
        user_id=user,
    )
