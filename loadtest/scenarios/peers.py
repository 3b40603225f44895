"""The same work with other libraries, each used as its documentation recommends, in one run."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from loadtest.drive import Say, one_at_a_time, saturated
from loadtest.generator import APP, ENDPOINT, SOCKET_IO, Plan, Wire, crowd
from loadtest.processes import ROOT, Target, commands, redis_server, targets
from loadtest.results import Plot, Result, percentile

ABOUT = "the same fan-out with other libraries: 1000 sockets, 128 B, one process, through Redis"
SOCKETS, SIZE, RATE = 1000, 128, 10
NODE_PACKAGES = ["socket.io@4", "@socket.io/redis-adapter@8", "redis@5", "ws@8"]

PYTHON: list[tuple[str, str, Wire, str]] = [
    ("asgi-cluster, endpoint", "endpoint", ENDPOINT, "asgi_cluster"),
    ("asgi-cluster, cluster.accept", "app", APP, "asgi_cluster"),
    ("tutorial loop", "tutorial", APP, "redis"),
    ("Litestar channels", "litestar", APP, "litestar"),
    ("python-socketio", "socketio", SOCKET_IO, "socketio"),
    ("channels_redis Pub/Sub", "channels", APP, "channels_redis"),
]
NODE: list[tuple[str, str, Wire]] = [("Socket.IO on Node", "socketio", SOCKET_IO), ("ws on Node", "ws", APP)]

_COLUMNS = ["peer", "deliveries/s", "CPU µs/delivery", "one at a time, µs", "p99 ms", "KB/socket", "lost"]
_RATIOS = ["our deliveries/s ×", "our CPU 1/×"]


def run(options: argparse.Namespace, say: Say) -> Result:
    result = Result("peers", ABOUT, [*_COLUMNS, *_RATIOS])
    result.plots.append(Plot("p99 against CPU per delivery", "CPU µs/delivery", "p99 ms"))
    with redis_server(options.redis) as url:
        for name, kind, wire, module in PYTHON:
            if find_spec(module) is None:
                result.notes.append(f"{name} is not installed: uv run --group peers python -m loadtest peers")
                continue
            with targets(kind, url, prefix=f"peers-{kind}") as (target,):
                _one(result, name, target, wire, options.seconds, say)
        with _node_packages(result, say) as packages:
            for name, kind, wire in NODE if packages else []:
                line = ["node", "--expose-gc", str(ROOT / "loadtest/targets/node.cjs")]
                line += [kind, "{port}", url, f"peers-{kind}"]
                with commands([line], name=name, env={"NODE_PATH": str(packages)}) as (target,):
                    _one(result, name, target, wire, options.seconds, say)
    rates = {row[0]: row[1] for row in result.rows}
    if (theirs := rates.get("Socket.IO on Node")) and (ours := rates.get("asgi-cluster, endpoint")):
        ratio = float(ours) / float(theirs)
        result.budget(f"{ratio:.1f} × the deliveries/s of Socket.IO on Node, budget 5", ratio >= 5)
    result.notes.append(
        f"p99: age at arrival with {RATE} messages/s; KB/socket: resident memory of {SOCKETS} idle sockets"
    )
    return result


def _one(result: Result, name: str, target: Target, wire: Wire, seconds: float, say: Say) -> None:
    say(f"{name}: connecting")
    with crowd(Plan(wire, [target.port], 50)) as first:
        first.wait_ready()
        target.ask("/collect")
        before = target.resident()
        with crowd(Plan(wire, [target.port], SOCKETS)) as clients:
            clients.wait_ready()
            target.ask("/collect")
            memory = (target.resident() - before) / SOCKETS / 1024
            first.stop()
            say(f"{name}: saturated")
            full = saturated(target, clients, size=SIZE, seconds=seconds)
            say(f"{name}: one at a time")
            single = one_at_a_time(target, clients, size=SIZE, seconds=seconds)
            clients.stop()
    with crowd(Plan(wire, [target.port], SOCKETS, latency=True)) as clients:
        clients.wait_ready()
        say(f"{name}: age at arrival")
        count = int(RATE * seconds * 2)
        target.ask(f"/publish?count={count}&batch=1&size={SIZE}&gap={1000 / RATE}")
        clients.wait_received(count * SOCKETS)
        report = clients.stop()
    p99 = percentile(report.latencies, 0.99) * 1000
    lost = (full.sent + single.sent + count) * SOCKETS
    lost -= full.deliveries + single.deliveries + report.received
    ours = result.rows[0] if result.rows else None
    ratios: list[float | None] = [None, None]
    if ours is not None:
        ratios = [float(ours[1] or 0) / full.rate, full.cost / float(ours[2] or 1)]
    result.row(name, full.rate, full.cost, single.cost, p99, memory, lost, *ratios)
    result.plots[0].add(name, full.cost, p99)
    if name.startswith("asgi-cluster"):
        result.require(f"{name}: nothing lost", lost == 0)


@contextmanager
def _node_packages(result: Result, say: Say) -> Iterator[Path | None]:
    """The packages for Node in a temporary folder; ``None`` when npm is missing or cannot install them."""
    if shutil.which("npm") is None:
        result.notes.append("npm is not installed: Socket.IO and ws were not measured")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="loadtest-node-") as directory:
        say("installing Node's packages into a temporary folder")
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", directory, *NODE_PACKAGES]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180, check=False
        )
        if done.returncode != 0:
            result.notes.append("npm could not install Socket.IO and ws: they were not measured")
            yield None
        else:
            yield Path(directory, "node_modules")
