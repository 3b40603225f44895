"""Fixtures of the whole suite. Support code is in ``tests/support``."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.requirements import run_with_the_test_group
from tests.support.servers import Server, debian_binary, start_valkey
from tests.support.topologies import RedisCluster, SentinelSet, start_redis_cluster, start_sentinel_set

QUICK = "(quick and not server)"


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Adds no option. This hook runs before options of plugins that are not installed yet are refused."""
    run_with_the_test_group(pluginmanager)


def pytest_configure(config: pytest.Config) -> None:
    """A quick test is one only with the parameters that need no server."""
    config.option.markexpr = re.sub(r"\bquick\b", QUICK, config.option.markexpr)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``-m quick`` does not import what has no quick tests: that takes longer than the tests."""
    if config.option.markexpr != QUICK:
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("pytest.mark.quick" in file.read_text() for file in files) else True


@pytest.fixture(autouse=True)
def _quick_starts_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is marked as quick fails when it starts a server or a process."""
    node = request.node
    if node.get_closest_marker("quick") is None or node.get_closest_marker("server") is not None:
        return

    def refuse(*args: object, **options: object) -> NoReturn:
        raise AssertionError("a quick test starts a server or a process: take its mark away")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(socket.socket, "listen", refuse)


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


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.server)])
def cluster_url(request: pytest.FixtureRequest, prefix: str) -> str:
    """Each backend in turn. On memory the prefix is the name: nodes of one test meet, tests do not."""
    return f"memory://{prefix}" if request.param == "memory" else str(request.getfixturevalue("redis_url"))
