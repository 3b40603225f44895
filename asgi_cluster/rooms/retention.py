"""What rooms keep, in the whole cluster.

Whether a room has a history does not depend on the process that publishes to it: a worker without rules, and
an app with other rules, keep what the nodes' rules say. So every node declares its rules in the store of the
rooms, and every process reads the declarations of the others. A node without history rules declares an empty
list. A declaration that no node has renewed for a minute is removed by a node that has renewed its own.
While no node runs, the last declarations stay for a week.

What was read may be relied on for ``VIEW`` seconds. A node whose rules are new to the cluster waits, before
it serves, until every reading from before its declaration is older than that. From then on every publisher
has the rules, and no publication is delivered and not kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from asgi_cluster.exceptions import BusUnavailable, ClusterError
from asgi_cluster.node import Node
from asgi_cluster.rooms.history import Declarations, HistoryStore
from asgi_cluster.rooms.rules import RoomRule, find_rule

__all__ = ["Kept", "Retention"]

logger = logging.getLogger("asgi_cluster.realtime")

VIEW = 2.0
"""Seconds for which a process relies on what it has read."""

_EVERY = 1.0
_IDLE_AFTER = 10.0
"""Seconds without a publication after which a process with ``listen=False`` stops reading in the background.
Its next publication takes a second round trip. A node goes on reading.
"""


@dataclass(frozen=True, slots=True, order=True)
class Kept:
    """How many publications a room keeps, for how many seconds after the last."""

    size: int
    ttl: float


class _Declared(msgspec.Struct, array_like=True):
    pattern: str
    history: int
    history_ttl: float


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[_Declared])


class Retention:
    """The history rules of this process and of the others.

    Where several give a room a history, the largest counts: the most publications, then the longest time.
    """

    def __init__(
        self,
        rules: Sequence[RoomRule],
        history: HistoryStore,
        *,
        node: Node,
    ) -> None:
        self._rules = rules
        self._history = history
        self._node = node
        self._timeout = node.deadline
        self._clock = node.clock
        self._declared = b""
        self._keeps = any(rule.history for rule in rules)
        if node.listens:
            declared = [_Declared(rule.pattern, rule.history, rule.history_ttl) for rule in rules]
            self._declared = _encoder.encode(declared if self._keeps else [])
        self._digest = hashlib.sha256(self._declared).hexdigest()[:16] if self._declared else ""
        self._read: dict[bytes, list[RoomRule]] = {}
        self._others: list[list[RoomRule]] = []
        self._reported: set[object] = set()
        self._until = self._used_at = float("-inf")
        self._reading: asyncio.Future[None] | None = None
        self._in_process = history.in_process
        self.epoch = ""
        """Names the numbering of rooms in which nothing has been published; see ``Declarations.epoch``."""

    def of(self, room: str) -> Kept | None:
        """What ``room`` keeps; ``None``: nothing. Rests on what was read last: ``refresh`` first."""
        best = None
        for rules in (self._rules, *self._others):
            found = find_rule(rules, room)
            if found is not None and found[0].history:
                kept = Kept(found[0].history, found[0].history_ttl)
                best = kept if best is None else max(best, kept)
        return best

    async def refresh(self, timeout: float) -> float:
        """Read the declarations if what was read is too old. Returns what is left of ``timeout``.

        Raises:
            BusUnavailable: they could not be read.
        """
        self._used_at = began = self._clock()
        if began < self._until:
            return timeout
        loop = asyncio.get_running_loop()
        while (reading := self._reading) is not None and reading.get_loop() is loop:
            # One reading serves all who wait for it; if it fails, the next one tries.
            await asyncio.wait([reading], timeout=max(0.0, timeout - (self._clock() - began)))
            if self._clock() < self._until or not reading.done():
                break
        else:
            self._reading = reading = loop.create_future()
            try:
                await self._exchange(timeout - (self._clock() - began))
            finally:
                reading.set_result(None)
                if self._reading is reading:
                    self._reading = None
        if self._clock() >= self._until and not self._in_process:
            raise BusUnavailable(f"the room rules could not be read within {timeout:.2f} s")
        return max(0.0, timeout - (self._clock() - began))

    async def start(self) -> None:
        """Declare this node's rules, and wait until all publishers have its histories. Raises
        ``BusUnavailable``.
        """
        wait = await self._exchange(self._timeout)
        if wait and self._keeps:
            logger.info("room rules that are new to the cluster: waiting %.1f s for other publishers", wait)
            await asyncio.sleep(wait)

    async def run(self) -> None:
        """Renew the declaration and the reading, until cancelled."""
        while True:
            await asyncio.sleep(_EVERY * random.uniform(0.5, 1.0))
            if not self._declared and self._clock() - self._used_at > _IDLE_AFTER:
                continue
            try:
                await self._exchange(self._timeout)
            except ClusterError as error:
                logger.debug("the room rules could not be read (%s)", type(error).__name__)

    async def _exchange(self, timeout: float) -> float:
        began = self._clock()
        found = await self._history.declare(
            self._digest,
            self._declared,
            node=self._node.id,
            # A publication that began at the last moment of the reading may take the timeout.
            view=VIEW + self._timeout,
            timeout=timeout,
        )
        self._until = began + VIEW if not self._in_process else float("-inf")
        self.epoch = found.epoch
        self._adopt(found)
        return found.wait

    def _adopt(self, found: Declarations) -> None:
        if self._read.keys() != {rules for _, rules in found.others}:
            self._read = {rules: self._decode(node, rules) for node, rules in found.others}
            self._others = [rules for rules in self._read.values() if rules]
            for node, encoded in found.others:
                self._compare(node, self._read[encoded])

    def _decode(self, node: str, encoded: bytes) -> list[RoomRule]:
        try:
            return [
                RoomRule(each.pattern, history=each.history, history_ttl=each.history_ttl)
                for each in _decoder.decode(encoded)
            ]
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors, and so are those of a rule
            logger.error("the room rules of node %s cannot be read (another version?): ignored", node)
            return []

    def _compare(self, node: str, theirs: Sequence[RoomRule]) -> None:
        own = {rule.pattern: Kept(rule.history, rule.history_ttl) for rule in self._rules}
        for rule in theirs:
            here, there = own.get(rule.pattern), Kept(rule.history, rule.history_ttl)
            if here is None or here == there or not (here.size or there.size):
                continue
            if (rule.pattern, there) not in self._reported:
                self._reported.add((rule.pattern, there))
                logger.warning(
                    "room rule %r differs: history=%d, history_ttl=%g on node %s, and history=%d, "
                    "history_ttl=%g on node %s. The larger counts; give all nodes the same rules",
                    *(rule.pattern, here.size, here.ttl, self._node.id, there.size, there.ttl, node),
                )

    def __repr__(self) -> str:
        return f"<Retention by {len(self._rules)} rules here and {len(self._others)} other sets>"
