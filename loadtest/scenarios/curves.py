"""Up to 1000 sockets in other shapes: more rooms, fewer members, more nodes."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

from loadtest.drive import Measure, Say
from loadtest.generator import ENDPOINT_ROOMS, Crowd, Plan, crowd
from loadtest.processes import Target, redis_server, targets
from loadtest.results import Plot, Result

ABOUT = "what a delivery costs by rooms, members of a room, and nodes: 128 B, saturated"
SIZE = 128
SHAPES = {  # rooms and members of each
    "rooms": ((1, 1000), (10, 100), (100, 10), (1000, 1)),
    "members": ((1, 1), (1, 10), (1, 100), (1, 1000)),
}
NODES = (1, 2, 3)


def run(options: argparse.Namespace, say: Say) -> Result:
    columns = [
        "curve",
        "nodes",
        "rooms",
        "members",
        "deliveries/s",
        "CPU µs/delivery",
        "CPU µs/publish",
        "lost",
    ]
    result = Result("curves", ABOUT, columns)
    result.plots += [Plot(f"By {curve}", curve, "CPU µs/delivery") for curve in (*SHAPES, "nodes")]

    def measure(curve: str, x: int, nodes: Sequence[Target], rooms: int, members: int) -> None:
        name = f"nodes {len(nodes)}, rooms {rooms}, members {members}"
        say(name)
        plan = Plan(ENDPOINT_ROOMS, [node.port for node in nodes], rooms * members, rooms=rooms)
        with crowd(plan) as clients:
            clients.wait_ready()
            found = saturated_rooms(nodes, clients, seconds=options.seconds)
            report = clients.stop()
        result.require(
            f"{name}: every socket got all messages of its room", report.complete(found.sent // rooms)
        )
        result.row(
            curve,
            len(nodes),
            rooms,
            members,
            found.rate,
            found.cost,
            found.cpu / found.sent * 1e6,
            found.sent * members - found.deliveries,
        )
        plot = next(plot for plot in result.plots if plot.x == curve)
        plot.add("endpoint", x, found.cost)

    with redis_server(options.redis) as url:
        with targets("endpoint", url, prefix="curves") as nodes:
            for curve, shapes in SHAPES.items():
                for rooms, members in shapes:
                    measure(curve, rooms if curve == "rooms" else members, nodes, rooms, members)
        for count in NODES:
            with targets("endpoint", url, count=count, prefix=f"curves{count}") as nodes:
                measure("nodes", count, nodes, 1, 1000)
    result.notes.append("a publish is one message to one room; CPU is that of all nodes, Redis not included")
    return result


def saturated_rooms(nodes: Sequence[Target], clients: Crowd, *, seconds: float) -> Measure:
    """As ``drive.saturated``, with the rooms in turn; a portion has as many messages for each room."""
    rooms, sockets = clients.plan.rooms, clients.plan.sockets
    step = math.lcm(rooms, 10)
    portion, largest = step, max(step, min(20_000, 400_000 * rooms // sockets) // step * step)
    before, cpu, start = clients.received, sum(node.cpu() for node in nodes), time.monotonic()
    sent = 0
    while time.monotonic() - start < seconds:
        asked = time.monotonic()
        nodes[0].ask(f"/publish?count={portion}&batch=10&size={SIZE}&rooms={rooms}")
        sent += portion
        if not clients.wait_received(before + (sent - portion) * sockets // rooms):
            break  # a message is lost: nothing more will arrive
        if time.monotonic() - asked < seconds / 10:
            portion = min(largest, portion * 2)
    clients.wait_received(before + sent * sockets // rooms)
    elapsed = clients.last_arrival - start
    spent = sum(node.cpu() for node in nodes) - cpu
    return Measure(sent, clients.received - before, elapsed, spent)
