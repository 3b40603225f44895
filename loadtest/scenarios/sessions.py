"""The CPU time that a session adds to a request."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from loadtest.drive import Say
from loadtest.processes import ROOT, redis_server
from loadtest.results import Result

ABOUT = "CPU time that a session adds to a request: in process, alternating with other libraries"
CALLS = 3000


def run(options: argparse.Namespace, say: Say) -> Result:
    result = Result("sessions", ABOUT, ["way", "µs CPU/request", "µs added", "× Starlette's cookie"])
    with redis_server(options.redis) as url:
        say("reads and writes of 500 sessions, alternating")
        found = _measured("sessions", "--redis", url, "--calls", str(CALLS))
        say(f"cached reads of 10,000 of {options.stored:,} sessions, alternating with reads of ten")
        large = _measured("stored", "--redis", url, "--stored", str(options.stored))
    added, cookie = found["added"], found["added"]["Starlette cookie"]
    for name, cost in found["costs"].items():
        result.row(name, cost, added[name], None if name == "no session" else added[name] / cookie)
    ours = added["asgi-cluster, cached"]
    result.budget(
        f"a cached read adds {ours / cookie:.2f} × what Starlette's cookie adds, budget 0.5",
        ours <= cookie / 2,
    )
    if "starsessions on Redis" in added:
        ratio = added["starsessions on Redis"] / ours
        result.budget(
            f"starsessions on Redis adds {ratio:.0f} × as much as a cached read, budget 30", ratio >= 30
        )
    else:
        result.notes.append("starsessions is not installed: uv run --group peers python -m loadtest sessions")
    result.require(
        f"{found['commands']} Redis commands in {CALLS} cached reads (hit rate {found['hit_rate']:.4f})",
        found["commands"] <= 2,  # the counter's own connection may add CLIENT and HELLO
    )
    _add_stored(result, large, options.stored)
    return result


def _measured(module: str, *arguments: str) -> Any:
    """The JSON that a process under test prints."""
    command = [sys.executable, "-m", f"loadtest.targets.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the process under test failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def _add_stored(result: Result, found: Any, stored: int) -> None:
    (few_p50, many_p50), (few_p99, many_p99) = found["p50"], found["p99"]
    result.notes.append(
        f"a whole request, wall clock, p50 and p99: {few_p50:.1f} and {few_p99:.1f} µs with ten sessions, "
        f"{many_p50:.1f} and {many_p99:.1f} µs with {stored:,} in Redis ({found['redis_bytes'] / 1e6:.0f} MB)"
    )
    result.budget(
        f"p99 of cached reads with {stored:,} sessions: {found['ratio']:.2f} × that with ten, budget 1.2",
        found["ratio"] <= 1.2,
    )
    result.require(
        f"{found['hits']:.2%} of these reads came from the cache, which has {found['cached']:,} entries",
        found["hits"] > 0.999,
    )
