"""One room, many sockets, one process."""

from __future__ import annotations

import argparse
import sys

from loadtest.drive import Measure, Say, one_at_a_time, saturated
from loadtest.generator import APP, ENDPOINT, Crowd, Plan, Wire, crowd
from loadtest.processes import Target, commands, redis_server, targets
from loadtest.results import Plot, Result

ABOUT = "messages to every socket of a room: saturated (ten publishes at a time) and one at a time"
BARE = [sys.executable, "-m", "loadtest.targets.bare", "{port}"]


def run(options: argparse.Namespace, say: Say) -> Result:
    result = Result(
        "fanout",
        ABOUT,
        ["way", "sockets", "bytes", "mode", "deliveries/s", "CPU µs/delivery", "sent", "lost"],
    )
    result.plots = [
        Plot("CPU per delivery, 128 B", "sockets", "µs"),
        Plot("CPU per delivery, 1000 sockets", "bytes", "µs"),
    ]
    costs: dict[tuple[str, int, int, str], float] = {}

    def measure(
        way: str, wire: Wire, target: Target, sockets: int, sizes: list[int], modes: tuple[str, ...]
    ) -> None:
        with crowd(Plan(wire, [target.port], sockets)) as clients:
            clients.wait_ready()
            sent = sum(
                _one(result, costs, way, target, clients, size, mode, options.seconds, say).sent
                for size in sizes
                for mode in modes
            )
            report = clients.stop()
        result.require(
            f"{way}, {sockets} sockets: every socket got all {sent} messages", report.complete(sent)
        )

    modes = ("saturated", "one at a time")
    with redis_server(options.redis) as url:
        for sockets in options.sockets:
            with targets("endpoint", url, prefix="fanout") as (target,):
                sizes = [128] if sockets >= 10_000 else options.sizes
                measure("endpoint", ENDPOINT, target, sockets, sizes, modes)
        with targets("app", url, prefix="fanout") as (target,):
            measure("cluster.accept", APP, target, 1000, [128], modes)
        ratio = _beside_bare(result, url, say)
    ours = costs.get(("endpoint", 1000, 128, "saturated"))
    if ours is not None:
        result.budget(f"saturated: {ours:.2f} µs CPU per delivery, budget 1.5", ours <= 1.5)
    result.budget(f"one at a time: {ratio:.2f} × the bare system call, budget 1.5", ratio <= 1.5)
    return result


def _beside_bare(result: Result, url: str, say: Say) -> float:
    """One message at a time, alternating with the bare system call; returns the median of the ratios."""
    rounds: list[tuple[Measure, Measure]] = []
    with (
        targets("endpoint", url, prefix="beside") as (target,),
        commands([BARE], name="bare") as (floor,),
        crowd(Plan(ENDPOINT, [target.port], 1000)) as clients,
        crowd(Plan(APP, [floor.port], 1000)) as at_floor,
    ):
        clients.wait_ready()
        at_floor.wait_ready()
        for number in range(5):
            say(f"one at a time, alternating with the bare system call: round {number + 1} of 5")
            pair = (
                one_at_a_time(target, clients, size=128, seconds=0.8),
                one_at_a_time(floor, at_floor, size=128, seconds=0.8),
            )
            rounds.append(pair)
    rounds.sort(key=lambda pair: pair[0].cost / pair[1].cost)
    ours, bare = rounds[2]
    for way, found in (("endpoint, alternating with", ours), ("bare system call", bare)):
        lost = found.sent * 1000 - found.deliveries
        result.row(way, 1000, 128, "one at a time", found.rate, found.cost, found.sent, lost)
    return ours.cost / bare.cost


def _one(
    result: Result,
    costs: dict[tuple[str, int, int, str], float],
    way: str,
    target: Target,
    clients: Crowd,
    size: int,
    mode: str,
    seconds: float,
    say: Say,
) -> Measure:
    sockets = clients.plan.sockets
    say(f"{way}: {sockets} sockets, {size} B, {mode}")
    go = saturated if mode == "saturated" else one_at_a_time
    found = go(target, clients, size=size, seconds=seconds)
    lost = found.sent * sockets - found.deliveries
    result.row(way, sockets, size, mode, found.rate, found.cost, found.sent, lost)
    costs[(way, sockets, size, mode)] = found.cost
    if size == 128:
        result.plots[0].add(f"{way}, {mode}", sockets, found.cost)
    if sockets == 1000:
        result.plots[1].add(f"{way}, {mode}", size, found.cost)
    return found
