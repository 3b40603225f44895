"""A node is killed while clients receive messages: which messages each client gets."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack

from loadtest.drive import Say
from loadtest.listeners import listeners
from loadtest.processes import Target, redis_server, targets
from loadtest.results import Result, percentile

ABOUT = "kill -9 of one node of three under load: 200 clients, 5 of 20 rooms with history each"
ROOMS, CLIENTS, EACH, NODES = 20, 200, 5, 3


def run(options: argparse.Namespace, say: Say) -> Result:
    columns = ["received", "expected", "lost unreported", "reported", "twice", "out of order", "reconnects"]
    result = Result("recovery", ABOUT, [*columns, "recovered p50 ms", "p99 ms"])
    names = [f"kept:{number}" for number in range(ROOMS)]
    last = dict.fromkeys(names, 0)
    with ExitStack() as stack:
        url = stack.enter_context(redis_server(options.redis))
        nodes = stack.enter_context(targets("endpoint", url, count=NODES, prefix="recovery"))
        people = stack.enter_context(listeners([node.port for node in nodes], names, CLIENTS, EACH))
        people.wait_ready()
        say("messages to all rooms")
        _publish(nodes[0], last, options.seconds)
        say("one node is killed")
        nodes[1].kill()
        _publish(nodes[0], last, options.seconds * 2)
        say("the clients recover")
        outcome = people.finish(last)
    expected = sum(last.values()) * CLIENTS * EACH // ROOMS
    times = [seconds * 1000 for seconds in outcome.recovery_times]
    result.row(
        outcome.received,
        expected,
        outcome.lost,
        outcome.reported,
        outcome.doubled,
        outcome.disordered,
        outcome.reconnects,
        percentile(times, 0.5),
        percentile(times, 0.99),
    )
    result.require(f"{outcome.lost} messages lost without a report", outcome.lost == 0)
    result.require(
        f"{outcome.doubled} twice, {outcome.disordered} out of order",
        outcome.doubled == outcome.disordered == 0,
    )
    result.require("the clients of the killed node connected again", len(times) >= CLIENTS // NODES)
    result.notes.append("a client waits 20 to 300 ms before it connects again; the times include that")
    return result


def _publish(node: Target, last: dict[str, int], seconds: float) -> None:
    """Publish to each room in turn, numbered from 1; only what the server has answered counts as sent."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for room in last:
            number = last[room] + 1
            node.ask(f"/keep?room={room.removeprefix('kept:')}&n={number}")
            last[room] = number
