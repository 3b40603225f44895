"""Every contract test runs on every kind of backend. A new kind is one entry in ``URLS``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack

import pytest

from asgi_cluster.ids import new_token
from tests.contract.sites import Site
from tests.support.servers import debian_binary, start_valkey
from tests.support.topologies import start_redis_cluster, start_sentinel_set


def _memory(stack: ExitStack) -> str:
    return "memory://contract"


def _valkey(stack: ExitStack) -> str:
    return stack.enter_context(start_valkey()).url


def _debian(stack: ExitStack) -> str:
    return stack.enter_context(start_valkey(binary=debian_binary())).url


def _sentinel(stack: ExitStack) -> str:
    return stack.enter_context(start_sentinel_set()).url


def _cluster(stack: ExitStack) -> str:
    return stack.enter_context(start_redis_cluster(replicas=0)).url


URLS: dict[str, Callable[[ExitStack], str]] = {
    "memory": _memory,
    "valkey": _valkey,
    "redis": _debian,
    "sentinel": _sentinel,
    "cluster": _cluster,
}
"""How to get the URL of each kind; what it starts is stopped with the stack, after the last test."""

SERVERS = ["valkey", "redis"]
"""Those that are one server, which a test may look into."""


@pytest.fixture(scope="session")
def url_of() -> Iterator[Callable[[str], str]]:
    """``url_of(kind)``: starts the servers of a kind when they are first asked for."""
    started: dict[str, str] = {}
    with ExitStack() as stack:

        def url(kind: str) -> str:
            if kind not in started:
                started[kind] = URLS[kind](stack)
            return started[kind]

        yield url


KINDS = [*URLS, "rooms apart"]


@pytest.fixture(
    params=[pytest.param(kind, marks=() if kind == "memory" else pytest.mark.server) for kind in KINDS]
)
async def site(request: pytest.FixtureRequest, url_of: Callable[[str], str]) -> AsyncIterator[Site]:
    """A cluster of its own on each kind of backend."""
    kind = request.param
    prefix = f"t{new_token()}"
    rooms_url = None
    match kind:
        case "memory":
            url = f"memory://{prefix}"
        case "rooms apart":
            url, rooms_url = url_of("valkey"), url_of("redis")
        case _:
            url = url_of(kind)
    async with AsyncExitStack() as stack:
        yield Site(kind, url, prefix, stack, rooms_url)


@pytest.fixture(params=SERVERS)
async def server_site(request: pytest.FixtureRequest, url_of: Callable[[str], str]) -> AsyncIterator[Site]:
    """The same on the kinds that have a server."""
    async with AsyncExitStack() as stack:
        yield Site(request.param, url_of(request.param), f"t{new_token()}", stack)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """For servers and nodes that only one test needs; left after it."""
    async with AsyncExitStack() as stack:
        yield stack
