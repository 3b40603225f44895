"""What one subscriber is subscribed to, and what it has to send for it. Without I/O.

A channel is *wanted* by this node, *sent* to the server, and *acknowledged* by it. Each method takes an event
and returns what is to be done, in this order; the subscriber does it. One command carries all the joins and
leaves of a loop tick, so that a join and a leave in one tick cost nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from asgi_cluster.backends.redis.errors import first_word

__all__ = [
    "MOVED",
    "Acknowledged",
    "Action",
    "Answer",
    "Gap",
    "GiveUp",
    "Refuse",
    "Retry",
    "Subscribe",
    "Subscriptions",
    "Unsubscribe",
]

MOVED = frozenset(("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN"))
"""First words of error replies that say: another server has the slot, or none has it yet."""

_BATCH = 500


class Subscribe(NamedTuple):
    """Send the commands, one for each list of channels, and pass the outcome to ``answered``."""

    commands: Sequence[Sequence[str]]
    number: int


class Unsubscribe(NamedTuple):
    """Send the commands, one for each list of channels; the outcome is of no interest."""

    commands: Sequence[Sequence[str]]


class Acknowledged(NamedTuple):
    """Report that messages on these channels arrive from now on."""

    channels: frozenset[str]


class Gap(NamedTuple):
    """Report that messages on these channels may have been lost."""

    channels: frozenset[str]
    reason: str


class Answer(NamedTuple):
    """The callers that wait for these channels need not wait any longer."""

    channels: frozenset[str]


class Refuse(NamedTuple):
    """The callers that wait for this channel get the error."""

    channel: str
    error: Exception


class Retry(NamedTuple):
    """Call ``retry`` with these channels, a little later."""

    channels: frozenset[str]


class GiveUp(NamedTuple):
    """Close the connection: it is of no use."""

    reason: str | Exception


Action = Subscribe | Unsubscribe | Acknowledged | Gap | Answer | Refuse | Retry | GiveUp


class Subscriptions:
    """The channels of one subscriber, through all of its connections.

    ``vital``: channels without which a connection is of no use.
    """

    def __init__(self, *, sharded: bool, vital: Collection[str] = ()) -> None:
        self._sharded = sharded
        self._vital = vital
        self._wanted: set[str] = set()
        self._sent: dict[str, int] = {}  # and the number of the last Subscribe for it
        self._acknowledged: set[str] = set()
        self._waiting: set[str] = set()
        self._changed: set[str] = set()  # since the last flush
        self._established = False
        self._count = 0

    def __len__(self) -> int:
        return len(self._wanted)

    @property
    def established(self) -> bool:
        """Whether there is a connection, subscribed to all that was wanted when it was opened."""
        return self._established

    @property
    def changed(self) -> bool:
        """Whether ``flush`` is to be called at the end of this loop tick."""
        return bool(self._changed)

    def acknowledged(self, channel: str) -> bool:
        """Whether the subscription to ``channel`` stands."""
        return channel in self._acknowledged

    # Callers

    def want(self, channel: str) -> None:
        """Subscribe at the next flush, or when there is a connection."""
        self._wanted.add(channel)
        self.retry((channel,))

    def wait(self, channel: str) -> bool:
        """Whether a caller that wants ``channel`` has to wait for an ``Answer`` or a ``Refuse``.

        While there is no connection it has not: the channel is among the first to be sent then.
        """
        if not self._established or channel in self._acknowledged:
            return False
        self._waiting.add(channel)
        return True

    def drop(self, channel: str) -> None:
        """Unsubscribe at the next flush."""
        self._wanted.discard(channel)
        self.retry((channel,))

    def retry(self, channels: Iterable[str]) -> None:
        """Compare these channels with what was sent at the next flush."""
        if self._established:
            self._changed.update(channels)

    def flush(self) -> list[Action]:
        """Send what has changed since the last flush."""
        changed, self._changed = self._changed, set()
        left = changed - self._wanted
        actions = self._answer(left)
        leaving = sorted(channel for channel in left if channel in self._sent)
        if leaving:
            for channel in leaving:
                del self._sent[channel]
                self._acknowledged.discard(channel)
            actions.append(Unsubscribe(self._commands(leaving)))
        joining = [channel for channel in changed & self._wanted if channel not in self._sent]
        return actions + self._subscribe(joining)

    # The connection

    def opened(self) -> list[Action]:
        """There is a connection: subscribe to everything. Call ``established`` when all is answered."""
        return self._subscribe(self._wanted)

    def establish(self) -> list[Action]:
        """All that ``opened`` has sent is answered. What has changed meanwhile is sent by the next flush."""
        self._established = True
        self._changed = self._wanted ^ self._sent.keys()
        return [Acknowledged(frozenset(self._acknowledged))]

    def answered(self, sent: Subscribe, refused: Mapping[str, Exception]) -> list[Action]:
        """The server has answered ``sent``, and has refused some of its channels."""
        # A channel that was left meanwhile, or left and joined again, has a later command on the way.
        commands = [[each for each in one if self._sent.get(each) == sent.number] for one in sent.commands]
        current = {channel for command in commands for channel in command}
        arriving = frozenset(current - refused.keys())
        self._acknowledged |= arriving
        actions: list[Action] = []
        if arriving and self._established:
            actions = [*self._answer(arriving), Acknowledged(arriving)]
        lost = current & refused.keys()
        for channel in lost:
            del self._sent[channel]
        moved = frozenset(channel for channel in lost if first_word(refused[channel]) in MOVED)
        if moved:
            # Their messages arrive again when the server that has them now has acknowledged; until then this
            # is a gap, and no caller need wait.
            actions += [*self._answer(moved), Gap(moved, "channels are being moved"), Retry(moved)]
        # The refusal of one channel refuses all of its command.
        alone = {one[0] for one in sent.commands if len(one) == 1}
        actions += self._subscribe(lost - moved - alone, apart=True)
        for channel in sorted((lost - moved) & alone):
            if channel in self._vital:
                return [*actions, GiveUp(refused[channel])]
            self._wanted.discard(channel)
            self._waiting.discard(channel)
            actions.append(Refuse(channel, refused[channel]))
        return actions

    def ended(self, channel: str) -> list[Action]:
        """The server has ended a subscription unasked: on a Cluster, the slot has moved away."""
        if self._sent.pop(channel, None) is None:
            return []  # left already
        self._acknowledged.discard(channel)
        if not self._sharded:
            return [GiveUp("the server ended a subscription")]
        # The slot may have come back here, or never have left: a MOVED in answer shows it.
        self.retry((channel,))
        return [Gap(frozenset((channel,)), "a channel has moved")]

    def lost(self, reason: str | None) -> list[Action]:
        """The connection is gone; without a reason it was closed on purpose."""
        actions = self._answer(set(self._waiting))
        if self._established and reason is not None:
            actions.append(Gap(frozenset(self._wanted), reason))
        self._established = False
        self._sent.clear()
        self._acknowledged.clear()
        self._changed.clear()
        return actions

    def _answer(self, channels: Iterable[str]) -> list[Action]:
        waiting = self._waiting.intersection(channels)
        self._waiting -= waiting
        return [Answer(frozenset(waiting))] if waiting else []

    def _subscribe(self, channels: Iterable[str], *, apart: bool = False) -> list[Action]:
        joining = sorted(channels)
        if not joining:
            return []
        self._count += 1
        self._sent.update(dict.fromkeys(joining, self._count))
        return [Subscribe(self._commands(joining, apart=apart), self._count)]

    def _commands(self, channels: Sequence[str], *, apart: bool = False) -> list[Sequence[str]]:
        # Channels of one sharded command must share a slot.
        size = 1 if self._sharded or apart else _BATCH
        return [channels[start : start + size] for start in range(0, len(channels), size)]
