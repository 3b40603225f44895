"""How long a message takes from the publisher to a client, at half of what the machine can carry."""

from __future__ import annotations

import argparse
import time

from loadtest.drive import Say
from loadtest.generator import ENDPOINT, Plan, crowd
from loadtest.processes import redis_server, targets
from loadtest.results import Plot, Result, percentile

ABOUT = "age of a message at its arrival: 3 nodes, 1000 sockets, 128 B, by load"
NODES, SOCKETS = 3, 1000


def run(options: argparse.Namespace, say: Say) -> Result:
    columns = ["load", "messages/s", "deliveries", "p50 ms", "p99 ms", "p999 ms", "max ms", "lost"]
    result = Result("latency", ABOUT, columns)
    plot = Plot("Age at arrival", "load, % of capacity", "ms", log=False)
    result.plots.append(plot)
    with redis_server(options.redis) as url, targets("endpoint", url, count=NODES, prefix="latency") as nodes:
        say("what one message costs, all processes together")
        capacity = 0.0
        for share in (0.0, 0.25, 0.5, 0.75):
            plan = Plan(ENDPOINT, [node.port for node in nodes], SOCKETS, latency=True)
            with crowd(plan) as clients:
                clients.wait_ready()
                if not share:
                    before = sum(node.cpu() for node in nodes) + clients.cpu()
                    nodes[0].ask("/publish?count=40&batch=1&gap=50")
                    clients.wait_received(40 * SOCKETS)
                    spent = sum(node.cpu() for node in nodes) + clients.cpu() - before
                    capacity = 2 / (spent / 40)  # two cores
                    continue
                rate = capacity * share
                seconds = options.seconds * 4 if share == 0.5 else options.seconds * 2
                count = max(100, int(rate * seconds))
                say(f"{share:.0%} load: {rate:.0f} messages/s for {count / rate:.0f} s")
                time.sleep(0.5)
                nodes[0].ask(f"/publish?count={count}&batch=1&gap={1000 / rate:.3f}")
                clients.wait_received(count * SOCKETS)
                report = clients.stop()
            ages = [age * 1000 for age in report.latencies]
            marks = [percentile(ages, rank) for rank in (0.5, 0.99, 0.999, 1.0)]
            lost = count * SOCKETS - report.received
            result.row(f"{share:.0%}", rate, report.received, *marks, lost)
            for name, mark in zip(("p50", "p99", "p999"), marks, strict=False):
                plot.add(name, share * 100, mark)
            result.require(f"{share:.0%} load: nothing lost", lost == 0)
            if share == 0.5:
                result.budget(f"p99 at half load {marks[1]:.1f} ms, budget 20", marks[1] <= 20)
    result.notes.append(
        "capacity: the rate of single, evenly spaced messages at which all processes together, "
        "this load test's clients too, would use two cores whole"
    )
    return result
