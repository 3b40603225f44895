"""Every row of the table of faults is met: the bounds hold, and no read is older than the lease."""

from __future__ import annotations

import pytest

from asgi_cluster.bus.lease import Heartbeats, Lease
from tests.bus.faults import CLUSTER, SENTINEL, SINGLE, Scene, many, nothing, our_objects, play, single
from tests.bus.partition import LAGS, partition
from tests.bus.traffic import CacheReceiver
from tests.support.servers import start_valkey


@pytest.mark.faults
@pytest.mark.parametrize("name", [*SINGLE, *SENTINEL, *CLUSTER])
async def test_a_fault_is_survived_within_its_bounds(name: str) -> None:
    """See ``docs/faults.md``."""
    row = await (single(name) if name in SINGLE else many(name))
    assert row.hits > 0, "nothing came from the cache: nothing was tested"
    assert row.met, " | ".join([*row.cells(), *row.left])


@pytest.mark.faults
async def test_a_node_that_ignores_invalidations_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table can fail: without the bus the cache would be stale."""
    monkeypatch.setattr(CacheReceiver, "session_message", lambda self, payload: None)
    with start_valkey() as server:
        row = await play("nothing", nothing, server.url, Scene(server, None))
    assert row.stale > 0
    assert not row.met


@pytest.mark.faults
@pytest.mark.parametrize("lag", LAGS)
async def test_a_partition_in_which_the_old_primary_answers(lag: int | None) -> None:
    """What the cache serves there is bounded with ``min-replicas-to-write``; without, it is not, and this
    says so. Afterwards the node follows the new primary as soon as a sentinel reaches it again.
    """
    limit = await partition(lag)
    assert limit.met, " | ".join(limit.cells())
    assert limit.cached or limit.stored, "nothing was stale: there was no partition"
    assert (limit.refused is None) == (lag is None)


def test_our_objects_are_counted_beside_a_class_without_a_module_name() -> None:
    """An extension module that the whole suite imports has a class with a descriptor there."""
    unnamed = type("Unnamed", (), {"__module__": property(lambda self: "extension")})()
    before = our_objects()
    echo = Heartbeats(Lease(1.0))
    assert our_objects() - before == {"Heartbeats": 1, "Lease": 1}, (unnamed, echo)
