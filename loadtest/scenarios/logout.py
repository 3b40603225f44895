"""The time from a logout on one node until the last socket of that session is closed, on three nodes."""

from __future__ import annotations

import argparse
import time

from loadtest.drive import Say
from loadtest.generator import ENDPOINT, Plan, crowd
from loadtest.processes import Target, redis_server, targets
from loadtest.results import Plot, Result, percentile

ABOUT = "live logout: 3 nodes, 1000 sockets, 5 to a session; 200 logouts"
SESSIONS, EACH, NODES = 200, 5, 3


def run(options: argparse.Namespace, say: Say) -> Result:
    result = Result("logout", ABOUT, ["from the request to", "p50 ms", "p99 ms", "max ms"])
    with redis_server(options.redis) as url, targets("endpoint", url, count=NODES, prefix="logout") as nodes:
        say(f"{SESSIONS} users sign in")
        cookies = [_login(nodes[number % NODES], number) for number in range(SESSIONS)]
        plan = Plan(
            ENDPOINT,
            [node.port for node in nodes],
            SESSIONS * EACH,
            cookies=[cookies[number // EACH] for number in range(SESSIONS * EACH)],
        )
        with crowd(plan) as clients:
            clients.wait_ready()
            say(f"{SESSIONS} users sign out, one after the other")
            begun, replied, complete = [], [], 0
            for number, cookie in enumerate(cookies):
                begun.append(time.monotonic())
                receipt = nodes[number % NODES].ask("/logout", headers={"Cookie": cookie})
                replied.append(time.monotonic())
                complete += receipt["complete"]
                time.sleep(0.01)
            clients.wait_closed(SESSIONS * EACH)
            report = clients.stop()
    last: dict[int, float] = {}
    first: dict[int, float] = {}
    for socket, _, when in report.closes:
        session = socket // EACH
        last[session] = max(last.get(session, 0.0), when)
        first[session] = min(first.get(session, when), when)
    closed = [(last[number] - begun[number]) * 1000 for number in last]
    opened = [(first[number] - begun[number]) * 1000 for number in first]
    answer = [(after - before) * 1000 for before, after in zip(begun, replied, strict=True)]
    rows = {"the first close": opened, "the last close": closed, "the receipt": answer}
    for name, found in rows.items():
        result.row(name, percentile(found, 0.5), percentile(found, 0.99), max(found, default=float("nan")))
    plot = Plot("Logouts, sorted", "share of logouts, %", "ms", log=False)
    for name, found in rows.items():
        for position, value in enumerate(sorted(found)[:: max(1, len(found) // 50)]):
            plot.add(name, position * 2, value)
    result.plots.append(plot)
    result.budget(
        f"p99 to the last close {percentile(closed, 0.99):.1f} ms, budget 50", percentile(closed, 0.99) <= 50
    )
    right = sum(1 for _, code, _ in report.closes if code == 4501)
    result.require(f"{right} of {SESSIONS * EACH} sockets closed with 4501", right == SESSIONS * EACH)
    result.require(f"{complete} of {SESSIONS} receipts complete", complete == SESSIONS)
    return result


def _login(node: Target, number: int) -> str:
    _, headers, _ = node.request(f"/login?user=user{number}")
    return headers["Set-Cookie"].split(";")[0]
