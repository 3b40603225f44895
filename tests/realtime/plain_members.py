"""An app for node processes: rooms with history and nothing that grows with the square of their members."""

from __future__ import annotations

from starlette.applications import Starlette

from asgi_cluster import Cluster, ClusterMiddleware, RealtimeConfig, RoomRule

cluster = Cluster(realtime=RealtimeConfig(rules=[RoomRule("kept:{name}", subscribe=True, history=1000)]))
app = ClusterMiddleware(Starlette(), cluster)
