"""What a message of the session bus does: one straight line to cache, hub and acknowledgement."""

from __future__ import annotations

import logging
from time import monotonic

from asgi_cluster.bus.messages import (
    Ack,
    Changed,
    Disconnect,
    Ended,
    Message,
    NodeDied,
    PersonalMessage,
    UserEnded,
    decode,
    encode,
)
from asgi_cluster.bus.session_bus import SUBSCRIBED_AGAIN, SessionBus
from asgi_cluster.exceptions import ClusterError
from asgi_cluster.ids import Handle, UserId, bucket_of
from asgi_cluster.node import Node
from asgi_cluster.rooms.rooms import Rooms
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.receipts import Acknowledgements
from asgi_cluster.sessions.revalidation import Revalidator
from asgi_cluster.sessions.tombstones import Tombstones
from asgi_cluster.sockets.hub import Hub
from asgi_cluster.tasks import spawn

__all__ = ["Dispatch"]

logger = logging.getLogger("asgi_cluster.dispatch")


class Dispatch:
    """The receiver of the session bus. Synchronous: what it does is done when it returns, so that the reply
    to the heartbeat comes after it.
    """

    def __init__(
        self,
        *,
        cache: SessionCache,
        hub: Hub,
        rooms: Rooms,
        acks: Acknowledgements,
        tombstones: Tombstones,
        bus: SessionBus,
        node: Node,
        revalidator: Revalidator,
    ) -> None:
        self._cache = cache
        self._hub = hub
        self._rooms = rooms
        self._acks = acks
        self._tombstones = tombstones
        self._bus = bus
        self._node = node
        self._revalidator = revalidator
        self.malformed = 0

    def session_message(self, payload: bytes) -> None:
        """Invalidations, logouts, messages to users, acknowledgements."""
        try:
            self._act_on(decode(payload))
        except ValueError:  # MalformedMessage, or a handle that is none
            # It may have been an invalidation: whatever is cached may be stale now.
            self.malformed += 1
            if self.malformed == 1:
                logger.error(
                    "a session message could not be decoded (another version?): dropping the cache each time"
                )
            self._cache.flush()
            self._revalidator.wake()

    def _act_on(self, message: Message) -> None:
        match message:
            case Changed(handle=handle):
                self._cache.drop(Handle(handle))
            case Ended():
                handle = Handle(message.handle)
                self._cache.drop(handle)
                self._tombstones.remember(handle, self._bus.run_id(int(handle[:2], 16)))
                # This node's own message too: if the reply to its commit was lost, this message proves the
                # commit.
                closed = self._hub.close_session(message.handle, message.code, message.reason)
                self._acknowledge(message.origin, message.request, closed)
            case UserEnded():
                keep = None if message.keep is None else Handle(message.keep)
                self._cache.drop_user(UserId(message.user), keep=keep)
                bucket = bucket_of(message.user)
                run_id = self._bus.run_id(bucket)
                ended = {Handle(f"{bucket:02x}.{token}") for token in message.ended}
                for handle in ended:
                    self._tombstones.remember(handle, run_id)
                closed = self._hub.end_user(
                    message.user,
                    keep=message.keep,
                    ended=ended,
                    code=message.code,
                    reason=message.reason,
                    name=message.request,
                )
                # Sockets of sessions that the message does not name: they began after it, or the store's
                # index had lost them, or they were too many to be named. They are checked before the
                # acknowledgement, which says that no socket of an ended session is open here.
                uncertain = self._hub.sockets_of(message.user, keep=message.keep)
                if uncertain:
                    origin, request = message.origin, message.request
                    self._revalidator.recheck(
                        uncertain, lambda more: self._acknowledge(origin, request, closed + more)
                    )
                else:
                    self._acknowledge(message.origin, message.request, closed)
            case Ack():
                self._acks.answer(message.request, message.node, message.sockets)
            case PersonalMessage():
                if message.handle is not None:
                    self._hub.send_session(message.handle, message)
                elif message.user is not None:
                    self._hub.send_user(message.user, message)
            case Disconnect(room=None):
                if message.handle is not None:
                    self._hub.close_session(message.handle, message.code, message.reason)
                elif message.user is not None:
                    self._hub.close_user(message.user, message.code, message.reason)
            case NodeDied():
                self._rooms.node_died(message.node, message.incarnation)
            case _:
                logger.debug("%s does not belong on a session channel", type(message).__name__)

    def _acknowledge(self, origin: str, request: str, sockets: int) -> None:
        if origin == self._node.id:
            self._acks.answer(request, origin, sockets)
        elif request:
            tasks = self._hub.closes.tasks if sockets else None
            if tasks is None:
                self._bus.post(origin, encode(Ack(request, self._node.id, sockets)))
            else:
                # Not uvicorn: such a server accepts or refuses a close a little later.
                work = self._acknowledge_later(origin, request, sockets, monotonic())
                try:
                    spawn(tasks, work, name="asgi-cluster acknowledgement")
                except RuntimeError:  # that socket's work has ended in this moment
                    self._bus.post(origin, encode(Ack(request, self._node.id, sockets)))

    async def _acknowledge_later(self, origin: str, request: str, sockets: int, since: float) -> None:
        sockets = max(0, sockets - await self._hub.failed_closes(since))
        self._bus.post(origin, encode(Ack(request, self._node.id, sockets)))

    def sessions_gap(self, reason: str, buckets: frozenset[int] | None) -> None:
        """Invalidations and logouts may have been missed."""
        if reason != SUBSCRIBED_AGAIN:  # the end of an outage, which was logged when it began
            logger.warning("session messages may have been missed (%s): cache dropped", reason)
        self._cache.flush(buckets)
        self._revalidator.wake()

    def node_removed(self, node: str, incarnation: str) -> None:
        """Publish it: each node with members in the dead node's rooms takes part in removing its members."""
        if self._node.tasks is not None:
            try:
                spawn(self._node.tasks, self._publish_death(node, incarnation), name="asgi-cluster node died")
            except RuntimeError:
                return  # this node is stopping

    async def _publish_death(self, node: str, incarnation: str) -> None:
        message = NodeDied(node, incarnation, self._node.id)
        try:
            await self._bus.publish(0, encode(message), timeout=self._node.deadline)
        except ClusterError as error:
            logger.info("the death of node %s was not published (%s)", node, type(error).__name__)

    def load(self) -> tuple[int, int]:
        """Sockets and rooms here."""
        return len(self._hub), self._rooms.count()
