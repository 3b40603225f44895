"""What the apps have in common that tests run in processes of their own."""

from __future__ import annotations

import logging
import os
from typing import Any

from asgi_cluster import Cluster, CookieConfig, RealtimeConfig, RoomRule, SessionConfig


def cluster_of_environment(rule: RoomRule) -> Cluster:
    """A cluster with one rule, logging from INFO on. ``ASGI_CLUSTER_URL``, ``PREFIX`` and ``DRAIN`` come from
    the environment.
    """
    logging.basicConfig(level=logging.INFO)
    drain = os.environ.get("DRAIN")
    drained: dict[str, Any] = {"drain": float(drain)} if drain else {}
    return Cluster(
        prefix=os.environ["PREFIX"],
        sessions=SessionConfig(cookie=CookieConfig(secure=False)),
        realtime=RealtimeConfig(rules=[rule], **drained),
    )
