"""Which primary has which slot of a Redis Cluster, as one of its nodes sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.crc import key_slot

__all__ = ["SLOTS", "HostPort", "View", "facts_of", "parse_redirect", "parse_slots", "slot_of", "tags"]

SLOTS = 16384

HostPort = tuple[str, int]

View = list[HostPort | None]
"""For each slot, host and port of its primary; ``None`` when no primary has it."""


def slot_of(key: str) -> int:
    """The slot of a key or a sharded channel; what is in ``{}`` counts, if anything is."""
    slot: int = key_slot(key.encode())
    return slot


def parse_slots(reply: Sequence[Any], asked: HostPort) -> View:
    """The reply to ``CLUSTER SLOTS``.

    An entry without an address means the one that was ``asked``.
    """
    view: View = [None] * SLOTS
    for first, last, primary, *_ in reply:
        host = (primary[0] or b"").decode()
        place = (asked[0] if host in ("", "?") else host, int(primary[1]))
        view[first : last + 1] = [place] * (last - first + 1)
    return view


def facts_of(info: bytes) -> tuple[bool, int, int]:
    """From ``CLUSTER INFO``: whether the node reports the state ``ok``, the newest epoch, and how many
    primaries. The greatest is right.
    """
    facts = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
    epoch, size = facts.get("cluster_current_epoch", "0"), facts.get("cluster_size", "0")
    return facts.get("cluster_state") == "ok", int(epoch), int(size)


def parse_redirect(error: Any, asked: HostPort) -> tuple[int, HostPort]:
    """Slot and target of redis-py's ``MovedError`` or ``AskError``."""
    return int(error.slot_id), (error.host or asked[0], int(error.port))


def tags(start: int = 0) -> list[str]:
    """Hash tags to choose from; a thousand of them meet any primary with more than a few slots."""
    return [f"beat{number}" for number in range(start, start + 1000)]
