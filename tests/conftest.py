"""Fixtures of the whole suite. Support code is in ``tests/support``."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from tests.quick import is_quick, refuse_to_start
from tests.support.requirements import run_with_the_test_group
from tests.support.servers import Server, debian_binary, start_valkey
from tests.support.topologies import RedisCluster, SentinelSet, start_redis_cluster, start_sentinel_set


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Adds no option. This hook runs before options of plugins that are not installed yet are refused."""
    run_with_the_test_group(pluginmanager)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_quick(item):
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def _quick_starts_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("quick"):
        refuse_to_start(monkeypatch)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """asyncio only: on trio the package refuses to start, which has a test of its own."""
    return "asyncio"


@pytest.fixture(scope="session")
def valkey() -> Iterator[Server]:
    """One server for all tests that leave it as they found it. Start another to kill, stop or fill it."""
    with start_valkey() as server:
        yield server


@pytest.fixture(scope="session")
def debian_redis() -> Iterator[Server]:
    """The distribution's redis-server; the test is skipped, with ``CI`` set it fails, where there is none."""
    with start_valkey(binary=debian_binary()) as server:
        yield server


@pytest.fixture(scope="session")
def sentinel_set() -> Iterator[SentinelSet]:
    """A Sentinel set for tests that leave it as they found it; ``start_sentinel_set`` for one to break."""
    with start_sentinel_set() as found:
        yield found


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[RedisCluster]:
    """A Redis Cluster for tests that leave it as they found it; ``start_redis_cluster`` for one to break."""
    with start_redis_cluster() as found:
        yield found


@pytest.fixture
def prefix() -> str:
    """Keys and channels of this test alone: Pub/Sub knows no databases."""
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
def redis_url(request: pytest.FixtureRequest) -> str:
    """A server's URL, for tests that need no more than that: ``REDIS_URL`` if the user has one."""
    return os.environ.get("REDIS_URL") or str(request.getfixturevalue("valkey").url)


@pytest.fixture(params=["memory", "redis"])
def cluster_url(request: pytest.FixtureRequest, prefix: str) -> str:
    """Each backend in turn. On memory the prefix is the name: nodes of one test meet, tests do not."""
    return f"memory://{prefix}" if request.param == "memory" else str(request.getfixturevalue("redis_url"))
