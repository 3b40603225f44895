"""How long a message takes from the publisher to a client, at a quarter, half and three quarters of the
machine's capacity.
"""

from __future__ import annotations

import argparse
import time

from loadtest.drive import Say
from loadtest.generator import ENDPOINT, Plan, crowd
from loadtest.processes import Target, redis_server, targets
from loadtest.results import Plot, Result, percentile

ABOUT = "age of a message at its arrival: 3 nodes, a room of 300 and one of 1000 sockets, 128 B, by load"
NODES = 3


def run(options: argparse.Namespace, say: Say) -> Result:
    columns = ["sockets", "load", "messages/s", "deliveries", "p50 ms", "p99 ms", "p999 ms", "max ms", "lost"]
    result = Result("latency", ABOUT, columns)
    result.plots.append(Plot("Age at arrival", "load, % of capacity", "ms", log=False))
    with redis_server(options.redis) as url, targets("endpoint", url, count=NODES, prefix="latency") as nodes:
        for sockets in (300, 1000):
            say(f"{sockets} sockets: the cost of one message in all processes together")
            capacity = _capacity(nodes, sockets)
            for share in (0.25, 0.5, 0.75):
                rate = capacity * share
                seconds = options.seconds * (3 if share == 0.5 else 2)
                say(f"{sockets} sockets, {share:.0%} load: {rate:.0f} messages/s for {seconds:.0f} s")
                _one(result, nodes, sockets, share, rate, max(100, int(rate * seconds)))
    result.notes.append(
        "capacity: the rate of single, evenly spaced messages at which all processes together, "
        "including the clients of this load test, would use two cores completely"
    )
    return result


def _capacity(nodes: list[Target], sockets: int) -> float:
    """Messages per second at which two cores would be busy, from the cost of 40 single messages."""
    with crowd(Plan(ENDPOINT, [node.port for node in nodes], sockets, latency=True)) as clients:
        clients.wait_ready()
        before = sum(node.cpu() for node in nodes) + clients.cpu()
        nodes[0].ask("/publish?count=40&batch=1&gap=40")
        clients.wait_received(40 * sockets)
        spent = sum(node.cpu() for node in nodes) + clients.cpu() - before
    return 2 * 40 / spent


def _one(result: Result, nodes: list[Target], sockets: int, share: float, rate: float, count: int) -> None:
    with crowd(Plan(ENDPOINT, [node.port for node in nodes], sockets, latency=True)) as clients:
        clients.wait_ready()
        time.sleep(0.5)
        nodes[0].ask(f"/publish?count={count}&batch=1&gap={1000 / rate:.3f}")
        clients.wait_received(count * sockets)
        report = clients.stop()
    ages = [age * 1000 for age in report.latencies]
    marks = [percentile(ages, rank) for rank in (0.5, 0.99, 0.999, 1.0)]
    lost = count * sockets - report.received
    result.row(sockets, f"{share:.0%}", rate, report.received, *marks, lost)
    for name, mark in zip(("p50", "p99", "p999"), marks, strict=False):
        result.plots[0].add(f"{name}, {sockets} sockets", share * 100, mark)
    result.require(f"{sockets} sockets, {share:.0%} load: nothing lost", lost == 0)
    if share == 0.5:
        result.budget(f"{sockets} sockets, half load: p99 {marks[1]:.1f} ms, budget 20", marks[1] <= 20)
