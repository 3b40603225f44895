"""A message on the bus that is none of ours, or of a version that we do not know."""

from __future__ import annotations

import logging

import pytest

from tests.sessions.app import client_for, nodes
from tests.support.servers import Server
from tests.support.waiting import eventually


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"hello",
        b"\x93\xa1z\x01\x02",
        b"\x92\xa1c",
        b"\x95\xa1e\xa0\x00\xa0\xa0",
        b"\x00" * 70_000,
    ],
)
async def test_undecodable_session_message_drops_the_cache_and_is_counted(
    valkey: Server, prefix: str, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been an invalidation: nothing cached is trusted; logged once, and all goes on."""
    async with nodes(valkey.url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/login?user=ada")
        await client.get("/show")
        assert cluster.stats().cache.size == 1
        raw = valkey.client()
        for _ in range(3):
            assert raw.publish(f"{prefix}:0:sessions", payload) == 1
        await eventually(lambda: cluster.stats().bus.malformed == 3)
        assert cluster.stats().cache.size == 0
        assert (await client.get("/show")).json()["user"] == "ada"
        raw.close()
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
