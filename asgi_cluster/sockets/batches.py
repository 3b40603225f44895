"""The end of a loop tick: what it brought is written."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asgi_cluster.sockets.outbox import Outbox, SlowPolicy
    from asgi_cluster.sockets.prepared import Packet

__all__ = ["Flusher"]

_SLICE = 0.01  # seconds the flusher may hold the loop: a large room must not make everything else wait
_WAVE_BYTES = 1 << 16


class Wave:
    """What one room got during a tick, for all of its members alike."""

    __slots__ = ("members", "messages", "size", "started")

    def __init__(self, members: Mapping[str, Outbox]) -> None:
        self.members = members
        self.messages: list[tuple[Packet, SlowPolicy, Hashable]] = []
        self.size = 0
        self.started: list[Outbox] | None = None
        """The outboxes that are still to be written to, once some have been."""


class Flusher:
    """Writes, at the end of a loop tick, what the outboxes of this loop got during it.

    In most ticks that is messages to one room. They are not put into each outbox but kept once, as a *wave*,
    and written to all members in one pass. Before anything else is put into an outbox, the wave is put into
    the outboxes (``spill``): then each outbox holds what it would have held without waves. So what is in an
    outbox always comes before the wave.
    """

    __slots__ = ("__weakref__", "_dirty", "_loop", "_scheduled", "wave")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._dirty: list[Outbox] = []
        self._scheduled = False
        self.wave: Wave | None = None

    def add(self, outbox: Outbox) -> None:
        """``outbox`` has something to write."""
        self._dirty.append(outbox)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def broadcast(
        self, members: Mapping[str, Outbox], packet: Packet, slow: SlowPolicy, key: Hashable
    ) -> None:
        """A message to all of ``members``, who may not change while there is a wave."""
        wave = self.wave
        if wave is None:
            wave = self.wave = Wave(members)
        elif wave.members is not members or wave.started is not None or wave.size > _WAVE_BYTES:
            # Several rooms may have members in common, and theirs belong in one write: not in a wave.
            self.spill()
            for outbox in members.values():
                outbox.put(packet, slow, key)
            return
        wave.messages.append((packet, slow, key))
        wave.size += packet.size
        self._schedule()

    def spill(self) -> None:
        """Put what the wave carries into the outboxes of the members that it has not reached."""
        wave, self.wave = self.wave, None
        if wave is not None:
            for outbox in tuple(wave.members.values()) if wave.started is None else wave.started:
                for message in wave.messages:
                    outbox.put(*message)

    def _flush(self) -> None:
        until = perf_counter() + _SLICE
        if self._flush_outboxes(until) and self._flush_wave(until) and self._flush_outboxes(until):
            self._scheduled = False
        else:
            self._loop.call_soon(self._flush)

    def _flush_outboxes(self, until: float) -> bool:
        dirty, self._dirty = self._dirty, []
        for index, outbox in enumerate(dirty):
            outbox.flush()
            if index & 31 == 31 and perf_counter() > until:
                self._dirty = dirty[index + 1 :] + self._dirty
                break
        return not self._dirty

    def _flush_wave(self, until: float) -> bool:
        """True when it is over."""
        wave = self.wave
        if wave is None:
            return True
        members = list(wave.members.values()) if wave.started is None else wave.started
        packets = [packet for packet, _, _ in wave.messages]
        frames = packets[0].frame if len(packets) == 1 else b"".join([packet.frame for packet in packets])
        missed: list[Outbox] = []
        failed: list[tuple[Outbox, Exception]] = []
        done = len(members)
        for index, outbox in enumerate(members):
            try:
                if not outbox.write(frames, len(packets)):
                    missed.append(outbox)
            except Exception as error:
                failed.append((outbox, error))  # later: closing a socket would break the wave
            if index & 31 == 31 and perf_counter() > until:
                done = index + 1
                break
        wave.started = members[done:]
        self.wave = wave if wave.started else None
        for outbox in missed:
            for message in wave.messages:
                outbox.put(*message)
        for outbox, raised in failed:
            outbox.fail(raised)
        return self.wave is None
