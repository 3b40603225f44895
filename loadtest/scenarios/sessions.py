"""What a session adds to a request."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from loadtest.drive import Say
from loadtest.processes import ROOT, redis_server
from loadtest.results import Result

ABOUT = "CPU that a session adds to a request, in process and in turns with the peers"
CALLS = 3000


def run(options: argparse.Namespace, say: Say) -> Result:
    result = Result("sessions", ABOUT, ["way", "µs CPU/request", "µs added", "× Starlette's cookie"])
    with redis_server(options.redis) as url:
        say("reads and writes of 500 people, in turns")
        command = [sys.executable, "-m", "loadtest.targets.sessions", "--redis", url, "--calls", str(CALLS)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the process under test failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout)
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
        result.budget(f"starsessions on Redis adds {ratio:.0f} × that, budget 30", ratio >= 30)
    else:
        result.notes.append("starsessions is not installed: uv run --group peers python -m loadtest sessions")
    result.require(
        f"{found['commands']} Redis commands in {CALLS} cached reads (hit rate {found['hit_rate']:.4f})",
        found["commands"] <= 2,  # CLIENT and HELLO of the counter's own connection may be among them
    )
    return result
