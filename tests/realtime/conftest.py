from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import pytest

from tests.realtime.site import Node, Site


@pytest.fixture
async def site(cluster_url: str, prefix: str) -> AsyncIterator[Site]:
    """A cluster to start nodes in, on each backend."""
    async with AsyncExitStack() as stack:
        yield Site(cluster_url, prefix, stack)


@pytest.fixture
async def redis_site(redis_url: str, prefix: str) -> AsyncIterator[Site]:
    """A cluster on a real server, for what matters only there."""
    async with AsyncExitStack() as stack:
        yield Site(redis_url, prefix, stack)


@pytest.fixture
async def lone_site(prefix: str) -> AsyncIterator[Site]:
    """A memory cluster, for what does not concern the backend."""
    async with AsyncExitStack() as stack:
        yield Site(f"memory://{prefix}", prefix, stack)


async def sign_in(node: Node, user: str) -> str:
    """A cookie of a new session of ``user``."""
    async with httpx.AsyncClient(base_url=node.http) as http:
        response = await http.get("/login", params={"user": user})
        assert response.status_code == 200
        return str(response.headers["set-cookie"].partition(";")[0])
