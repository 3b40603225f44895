"""An app for node processes: rooms with history and presence for everybody."""

from __future__ import annotations

from starlette.applications import Starlette

from asgi_cluster import Cluster, ClusterMiddleware, RealtimeConfig, RoomRule

cluster = Cluster(
    realtime=RealtimeConfig(
        rules=[
            RoomRule(
                "kept:{name}", subscribe=True, publish=True, history=1000, presence=True, join_leave=True
            )
        ]
    )
)
app = ClusterMiddleware(Starlette(), cluster)
