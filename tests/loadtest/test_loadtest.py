"""The load test itself: it counts right, and it fails when something is lost."""

from __future__ import annotations

import asyncio
import math
import xml.etree.ElementTree as ElementTree

import pytest
import redis

from loadtest.__main__ import NAMES, parse
from loadtest.drive import one_at_a_time, saturated
from loadtest.generator import APP, ENDPOINT, ENDPOINT_ROOMS, Plan, crowd
from loadtest.listeners import Subscription, _judge, _Listener
from loadtest.page import render
from loadtest.processes import targets
from loadtest.results import Plot, Result, percentile, show
from loadtest.scenarios.curves import saturated_rooms
from loadtest.targets import stored


def outcome(*numbers: int, last: int) -> tuple[int, int, int, int]:
    """Lost, twice, out of order and reported, of one client that received these numbers."""
    subscription = Subscription("r", numbers=list(numbers), reported=numbers.count(-1))
    found = _judge([_Listener([], {"r": subscription})], {"r": last})
    return found.lost, found.doubled, found.disordered, found.reported


@pytest.mark.parametrize(
    ("numbers", "last", "expected"),
    [
        ((1, 2, 3), 3, (0, 0, 0, 0)),
        ((1, 3), 3, (1, 0, 0, 0)),
        ((1, 2), 4, (2, 0, 0, 0)),
        ((), 2, (2, 0, 0, 0)),
        ((1, 2, 2, 3), 3, (0, 1, 0, 0)),
        ((1, 2, 3, 1, 4), 4, (0, 0, 1, 0)),
        ((1, -1, 5, 6), 6, (0, 0, 0, 1)),
        ((1, -1, 5), 6, (1, 0, 0, 1)),
    ],
)
def test_recovery_judges_every_sequence(
    numbers: tuple[int, ...], last: int, expected: tuple[int, int, int, int]
) -> None:
    """Missing without a report is lost; a reported loss (-1) lets the sequence go on anywhere, up to the last
    one."""
    assert outcome(*numbers, last=last) == expected


@pytest.mark.parametrize(("kind", "wire"), [("endpoint", ENDPOINT), ("app", APP)])
def test_generator_counts_what_was_sent(kind: str, wire: object, prefix: str) -> None:
    """Every message at every socket, saturated and alone; one message that was not sent shows as missing."""
    with targets(kind, f"memory://{prefix}", prefix=prefix) as (target,):
        with crowd(Plan(wire, [target.port], 20)) as clients:  # type: ignore[arg-type]
            clients.wait_ready()
            full = saturated(target, clients, size=128, seconds=0.2)
            alone = one_at_a_time(target, clients, size=5000, seconds=0.2)
            report = clients.stop()
        assert full.deliveries == full.sent * 20
        assert alone.deliveries == alone.sent * 20
        assert report.complete(full.sent + alone.sent)
        assert not report.complete(full.sent + alone.sent + 1)
        assert 0 < full.cost < 1000
        with crowd(Plan(wire, [target.port], 5, latency=True)) as clients:  # type: ignore[arg-type]
            clients.wait_ready()
            target.ask("/publish?count=10&batch=1&gap=5")
            assert clients.wait_received(50)
            ages = clients.stop().latencies
        assert len(ages) == 50
        assert all(0 < age < 5 for age in ages)


def test_rooms_share_the_sockets(prefix: str) -> None:
    """Each socket gets what goes to its own room, whatever their number, and nothing else."""
    with (
        targets("endpoint", f"memory://{prefix}", prefix=prefix) as nodes,
        crowd(Plan(ENDPOINT_ROOMS, [nodes[0].port], 12, rooms=4)) as clients,
    ):
        clients.wait_ready()
        found = saturated_rooms(nodes, clients, seconds=0.2)
        nodes[0].ask("/publish?count=1&rooms=4")
        assert clients.wait_received(found.deliveries + 3)
        report = clients.stop()
    assert found.deliveries == found.sent * 3
    assert report.complete(found.sent // 4) is False
    assert [count - found.sent // 4 for count in report.per_socket] == [1, 0, 0, 0] * 3


def test_many_sessions_are_stored_and_read_from_the_cache(redis_url: str) -> None:
    """Copies of a real session, each found with its own cookie; afterwards the server is as it was."""
    with redis.Redis.from_url(redis_url) as client:
        before = set(client.keys("*:s:*"))
        found = asyncio.run(stored.measure(redis_url, 300))
        assert (
            found["hits"] > 0.99
        )  # on a busy machine the lease may lapse for a moment, and then Redis is asked
        assert found["cached"] == 300
        assert 0 < found["ratio"] < 100
        assert set(client.keys("*:s:*")) == before


def test_generator_says_when_nothing_more_comes(prefix: str) -> None:
    """It does not wait for ever for a message that is lost."""
    with (
        targets("app", f"memory://{prefix}", prefix=prefix) as (target,),
        crowd(Plan(APP, [target.port], 3)) as clients,
    ):
        clients.wait_ready()
        target.ask("/publish?count=1")
        assert clients.wait_received(3)
        assert not clients.wait_received(4, patience=0.2)


def test_result_fails_only_when_something_required_does_not_hold() -> None:
    """A missed budget is said; a loss is a failure."""
    result = Result("r", "about", ["a"])
    result.budget("slow", holds=False)
    assert not result.failed
    result.require("lost", holds=False)
    assert result.failed


def test_page_is_self_contained_and_escapes() -> None:
    """Tables and plots, nothing from elsewhere, well-formed SVG, no markup from names."""
    result = Result("r", "a <b>", ["way", "µs"])
    result.row("<script>", 1.5)
    result.plots.append(Plot("t", "x", "y"))
    for x, y in ((1, 2.0), (10, math.nan), (100, 30.0)):
        result.plots[0].add("<line>", x, y)
    page = render({"cores": 2}, [result])
    assert "<script>" not in page
    assert "http" not in page
    start, end = page.index("<svg"), page.index("</svg>") + 6
    svg = ElementTree.fromstring(page[start:end])
    assert len(svg.findall("circle")) == 2


def test_percentile_is_the_nearest_rank() -> None:
    """Of nothing it is NaN, which shows as a dash."""
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile(range(1, 101), 0.99) == 99
    assert show(percentile([], 0.5)) == "-"
    assert show(1234567.8) == "1,234,568"


def test_command_line_knows_every_scenario() -> None:
    """Each has a module with what it is about."""
    for name in NAMES:
        assert parse([name]).scenario == [name]
    with pytest.raises(SystemExit):
        parse(["unknown"])
