"""The app that drain tests run in processes of their own: ``ASGI_CLUSTER_URL`` and ``PREFIX`` come from the
environment.
"""

from __future__ import annotations

import logging
import os

from starlette.applications import Starlette

from asgi_cluster import Cluster, ClusterMiddleware, CookieConfig, RealtimeConfig, RoomRule, SessionConfig

logging.basicConfig(level=logging.INFO)

drain = os.environ.get("DRAIN")
cluster = Cluster(
    prefix=os.environ.get("PREFIX", "drain"),
    sessions=SessionConfig(cookie=CookieConfig(secure=False)),
    realtime=RealtimeConfig(
        **({"drain": float(drain)} if drain else {}),
        rules=[RoomRule("log:{name}", subscribe=True, publish=True, history=10_000, history_ttl=600)],
    ),
)
app = ClusterMiddleware(Starlette(), cluster)
