"""How far it is from a response to the connection that saves its session."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import asgi_cluster
from asgi_cluster.backends.redis.connection import MultiplexedConnection
from asgi_cluster.backends.redis.scripts import load
from tests.sessions.app import nodes
from tests.sessions.requests import Browser

PACKAGE = str(Path(asgi_cluster.__file__).parent)
MOST = 8


def frames() -> list[str]:
    """The package's frames on the stack, from ``Response.message`` on, the outermost first."""
    found: list[str] = []
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code.co_qualname)
            if found[-1] == "Response.message":
                return found[::-1]
    raise AssertionError(f"not sent by a response: {found}")


async def test_a_write_passes_few_frames(
    redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer between a response and the connection is paid for by every request that writes."""
    send, paths = MultiplexedConnection.send, list[list[str]]()

    def noting(self: MultiplexedConnection, *args: str | bytes | int) -> Any:
        if args[:2] == ("EVALSHA", load("session_write").sha):
            paths.append([*frames(), "MultiplexedConnection.send"])
        return send(self, *args)

    async with nodes(redis_url, 1, prefix=prefix) as (cluster,):
        browser = Browser()
        await browser.on(cluster, lambda session: session.update(n=1))
        monkeypatch.setattr(MultiplexedConnection, "send", noting)
        assert (await browser.on(cluster, lambda session: session.update(n=2))).status_code == 200
    (path,) = paths
    assert len(path) <= MOST, " → ".join(path)
