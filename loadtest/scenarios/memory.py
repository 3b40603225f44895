"""The memory of an idle socket."""

from __future__ import annotations

import argparse
import time

from loadtest.drive import Say
from loadtest.generator import APP, ENDPOINT, Plan, Wire, crowd
from loadtest.processes import Target, redis_server, targets
from loadtest.results import Result

_TRACED = 500  # sockets in the run that traces allocations
ABOUT = "resident memory of idle sockets"


def run(options: argparse.Namespace, say: Say) -> Result:
    result = Result("memory", ABOUT, ["way", "sockets", "KB/socket", "after they closed, MB", "before, MB"])
    sockets = max(options.sockets)
    kinds: list[tuple[str, str, Wire, float | None]] = [
        ("bare uvicorn and Starlette", "plain-socket", APP, None),
        ("built-in endpoint", "endpoint", ENDPOINT, 20.0),
        ("app's own, cluster.accept", "app", APP, 24.0),
    ]
    with redis_server(options.redis) as url:
        for name, kind, wire, budget in kinds:
            say(f"{name}: {sockets} sockets")
            with targets(kind, url, prefix="memory") as (target,):
                per_socket, before, after = _hold(target, wire, sockets)
            result.row(name, sockets, per_socket, after / 1e6, before / 1e6)
            if budget is not None:
                result.budget(f"{name}: {per_socket:.1f} KB, budget {budget:g}", per_socket <= budget)
        say("built-in endpoint: allocations by package")
        with targets("endpoint", url, prefix="memory", env={"PYTHONTRACEMALLOC": "1"}) as (target,):
            result.notes.append(f"bytes per socket on the endpoint, by package: {_made_of(target)}")
    result.notes.append("without permessage-deflate: the clients do not ask for it")
    return result


def _hold(target: Target, wire: Wire, sockets: int) -> tuple[float, int, int]:
    # The first hundred sockets cause what is loaded and allocated once.
    with crowd(Plan(wire, [target.port], 100)) as first:
        first.wait_ready()
        target.ask("/collect")
        before = target.resident()
        with crowd(Plan(wire, [target.port], sockets)) as clients:
            clients.wait_ready(240)
            target.ask("/collect")
            time.sleep(1)  # until the work that follows each handshake is done
            held = target.resident()
            report = clients.stop()
        if report.closes:
            raise RuntimeError(f"{len(report.closes)} idle sockets were closed: {report.closes[:3]}")
        time.sleep(1)
        target.ask("/collect")
        return (held - before) / sockets / 1024, before, target.resident()


def _made_of(target: Target) -> str:
    with crowd(Plan(ENDPOINT, [target.port], 100)) as first:
        first.wait_ready()
        before = target.ask("/held")["held"]
        with crowd(Plan(ENDPOINT, [target.port], _TRACED)) as clients:
            clients.wait_ready()
            time.sleep(1)
            after = target.ask("/held")["held"]
    grown = {name: round((size - before.get(name, 0)) / _TRACED) for name, size in after.items()}
    parts = sorted(((size, name) for name, size in grown.items() if size >= 50), reverse=True)
    return ", ".join(f"{name} {size:,}" for size, name in parts)
