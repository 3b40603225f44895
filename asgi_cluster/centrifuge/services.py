"""What the client sessions of one endpoint share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asgi_cluster.centrifuge.limits import ConnectionLimits
    from asgi_cluster.config import RealtimeConfig
    from asgi_cluster.node import Node
    from asgi_cluster.rooms.rooms import Rooms
    from asgi_cluster.sockets.hub import Hub

__all__ = ["Services"]


@dataclass(frozen=True, slots=True)
class Services:
    """What the client sessions of one endpoint share."""

    config: RealtimeConfig
    node: Node
    hub: Hub
    rooms: Rooms
    limits: ConnectionLimits
