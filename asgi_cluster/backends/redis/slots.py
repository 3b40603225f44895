"""Which primary has which slot of a Redis Cluster, as one of its nodes sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.crc import key_slot
from redis.exceptions import RedisError

from asgi_cluster.backends.redis.address import Address, HostPort
from asgi_cluster.backends.redis.errors import ConnectionBroken, reason_of
from asgi_cluster.backends.redis.reconnect import connected
from asgi_cluster.exceptions import StoreUnavailable

__all__ = [
    "SLOTS",
    "View",
    "facts_of",
    "parse_redirect",
    "parse_slots",
    "read_slots",
    "slot_of",
    "tags",
]

SLOTS = 16384
_ANSWER = 0.5

View = list[HostPort | None]
"""For each slot, host and port of its primary; ``None`` when no primary has it."""


def slot_of(key: str) -> int:
    """The slot of a key or a sharded channel; what is in ``{}`` counts, if anything is."""
    slot: int = key_slot(key.encode())
    return slot


def parse_slots(reply: Sequence[Any], asked: HostPort) -> View:
    """The reply to ``CLUSTER SLOTS``.

    An entry without an address means the server ``asked`` itself.
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


def tags() -> list[str]:
    """Hash tags to choose from; a thousand of them reach every primary with more than a few slots."""
    return [f"beat{number}" for number in range(1000)]


async def read_slots(seeds: Sequence[Address]) -> View:
    """What the addresses in the URL report, tried one after the other. Raises ``StoreUnavailable``."""
    reasons: list[str] = []
    for seed in seeds:
        try:
            async with connected(seed.dial()) as connection, asyncio.timeout(_ANSWER):
                # The other question too: a right that is missing should stop the start.
                slots, _ = await asyncio.gather(
                    connection.send("CLUSTER", "SLOTS"), connection.send("CLUSTER", "INFO")
                )
                view = parse_slots(slots, seed.place)
        except (ConnectionBroken, RedisError, OSError) as error:
            no_cluster = "cluster support disabled" in str(error)
            cure = "this is no Redis Cluster: its URL starts with redis://"
            reasons.append(f"{seed.name}: {cure if no_cluster else reason_of(error)}")
            continue
        if any(view):
            return view
    raise StoreUnavailable("; ".join(reasons) or "no node of the Redis Cluster has slots")
