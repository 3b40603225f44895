"""The app that drain tests run in processes of their own; see ``cluster_of_environment``."""

from __future__ import annotations

from starlette.applications import Starlette

from asgi_cluster import ClusterMiddleware, RoomRule
from tests.support.process import cluster_of_environment

cluster = cluster_of_environment(
    RoomRule("log:{name}", subscribe=True, publish=True, history=10_000, history_ttl=600)
)
app = ClusterMiddleware(Starlette(), cluster)
