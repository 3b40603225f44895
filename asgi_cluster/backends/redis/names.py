"""Every key and channel name, in one place.

The hash tag ``{…}`` puts what belongs together into one Redis Cluster slot: everything of a user, everything
of a room. Pub/Sub ignores the database, so channel names carry its number. On a Cluster channels are sharded
and belong to a slot.

No two names are equal by accident. A prefix ends at the first ``{``, which it cannot contain; in a channel
without a hash tag at the first ``:``, so that those of the prefix are written ``%3A`` there. What follows the
last ``}`` says what a key of a room is.
"""

from __future__ import annotations

__all__ = ["Names"]


class Names:
    """Names for one prefix and database. ``sharded``: Redis Cluster, channels belong to slots. ``apart``:
    where the rooms are, when they have a URL of their own. A node is registered there as well, under other
    names: both URLs may lead to one server.
    """

    __slots__ = ("_apart", "_channels", "_prefix", "apart", "publish", "sharded")

    def __init__(self, prefix: str, *, db: int = 0, sharded: bool = False, apart: bool = False) -> None:
        self._prefix = prefix
        self.apart = apart
        self._apart = "rooms-" if apart else ""
        self._channels = f"{prefix.replace(':', '%3A')}:{db}"
        self.sharded = sharded
        self.publish = "SPUBLISH" if sharded else "PUBLISH"

    # Sessions: the handle is "<bucket>.<token>"

    def bucket(self, bucket: str) -> str:
        """What every key of a bucket (two hex digits) starts with."""
        return f"{self._prefix}:{{{bucket}}}:"

    def session(self, handle: str) -> str:
        return f"{self._prefix}:{{{handle[:2]}}}:s:{handle[3:]}"

    def lock(self, handle: str) -> str:
        return f"{self._prefix}:{{{handle[:2]}}}:l:{handle[3:]}"

    def epoch(self, bucket: str, user: str) -> str:
        return f"{self._prefix}:{{{bucket}}}:e:{user}"

    def index(self, bucket: str, user: str) -> str:
        return f"{self._prefix}:{{{bucket}}}:i:{user}"

    # Nodes

    def nodes(self) -> str:
        return f"{self._prefix}:{{nodes}}:{self._apart}all"

    def beat(self, node: str, tag: str = "nodes") -> str:
        return f"{self._prefix}:{{{tag}}}:{self._apart}beat:{node}"

    # Rooms

    def room_rules(self) -> str:
        return f"{self._prefix}:{{rooms}}:rules"

    def room_views(self) -> str:
        return f"{self._prefix}:{{rooms}}:views"

    def room_epoch(self) -> str:
        return f"{self._prefix}:{{rooms}}:epoch"

    def room_log(self, room: str) -> str:
        return f"{self._prefix}:{{room:{room}}}:log"

    def room_meta(self, room: str) -> str:
        return f"{self._prefix}:{{room:{room}}}:meta"

    def room_in(self, room: str) -> str:
        return f"{self._prefix}:{{room:{room}}}:in"

    def room_once(self, room: str, key: str) -> str:
        if "}" in room or "}" in key:
            key = key.replace("%", "%25").replace("}", "%7D")
            return f"{self._prefix}:{{room:{room}}}:key:{key}:once"
        return f"{self._prefix}:{{room:{room}}}:once:{key}"

    # Channels

    def sessions_channel(self, bucket: str) -> str:
        if self.sharded:
            return f"{self._prefix}:{{{bucket}}}:sessions"
        return f"{self._channels}:sessions"

    def node_channel(self, node: str) -> str:
        if self.sharded:
            return f"{self._prefix}:{{node:{node}}}:{self._apart}inbox"
        return f"{self._channels}:{self._apart}node:{node}"

    def room_channel(self, room: str) -> str:
        if self.sharded:
            return f"{self._prefix}:{{room:{room}}}:live"
        return f"{self._channels}:room:{room}"

    def room_of_channel(self, channel: str) -> str | None:
        """The room whose channel this is, or ``None``."""
        if self.sharded:
            start, end = f"{self._prefix}:{{room:", "}:live"
        else:
            start, end = f"{self._channels}:room:", ""
        if channel.startswith(start) and channel.endswith(end):
            return channel[len(start) : len(channel) - len(end)]
        return None
