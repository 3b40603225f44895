"""Whether a primary of a Redis Cluster is still the one that its peers take it for.

A primary that is cut off from its peers takes writes until the node timeout is over, and answers heartbeats.
Meanwhile the others may have replaced it. Its successor needed the votes of a majority, and each vote raised
that voter's epoch before. So a majority that stands at the newest known epoch, the primary in question among
them, proves that it had not been replaced at that moment: a successor's voters and this majority have one
member in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from asgi_cluster.bus.lease import Heartbeats, Lease

__all__ = ["PrimaryReport", "QuorumHeartbeats", "common_ground"]


class PrimaryReport(msgspec.Struct, frozen=True):
    """What a primary reports of the Cluster (``CLUSTER INFO``)."""

    sent_at: float
    """When the command was sent, on the lease's clock."""
    epoch: int
    """The newest epoch that it reports."""
    size: int
    """How many primaries it reports."""


def common_ground(reports: Sequence[PrimaryReport], primaries: int) -> tuple[int, float] | None:
    """The newest epoch that any of them reports, and the moment at which a majority still stood at it.

    ``None`` while there is no such majority. ``primaries``: how many there are in this node's table.
    """
    if not reports:
        return None
    newest = max(report.epoch for report in reports)
    agreeing = sorted((each.sent_at for each in reports if each.epoch == newest), reverse=True)
    majority = max(primaries, *(each.size for each in reports)) // 2 + 1
    return (newest, agreeing[majority - 1]) if len(agreeing) >= majority else None


class QuorumHeartbeats(Heartbeats):
    """Heartbeats whose replies renew nothing before it is proven that the primary has not been replaced."""

    __slots__ = ("proven",)

    def __init__(self, lease: Lease) -> None:
        super().__init__(lease)
        self.proven: float | None = None
        """When the last heartbeat was sent whose reply counts; ``None`` since the last gap."""

    def prove(self, sent_at: float) -> None:
        """See ``Heartbeats.prove``: the lease is renewed by ``confirm``."""
        self.proven = sent_at

    def gap(self) -> None:
        self.proven = None
        super().gap()

    def confirm(self, moment: float) -> None:
        """At ``moment`` the primary had not been replaced."""
        if self.proven is not None:
            self.lease.renew(min(self.proven, moment))
