"""``python -m loadtest NAME``: run scenarios, print their results and write them to files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from loadtest.page import render
from loadtest.results import Result, show

NAMES = ["sessions", "fanout", "curves", "logout", "latency", "memory", "recovery", "peers"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest",
        description="Measures asgi-cluster on this machine. Exit status 1: a message was neither received "
        "nor reported as lost. Compare figures of one run with each other; between machines compare ratios.",
    )
    scenarios = {name: import_module(f"loadtest.scenarios.{name}") for name in NAMES}
    parser.add_argument(
        "scenario",
        nargs="+",
        choices=[*NAMES, "all"],
        metavar="NAME",
        help="; ".join(["all", *(f"{name}: {module.ABOUT}" for name, module in scenarios.items())]),
    )
    parser.add_argument(
        "--redis", metavar="URL", help="the URL of your own Redis; default: an embedded Valkey"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results as JSON")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write the results as one self-contained page with plots"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="seconds of each run within a scenario (2)"
    )
    parser.add_argument(
        "--sockets",
        type=_numbers,
        default=[100, 1000, 10_000],
        metavar="N,N",
        help="numbers of sockets for fanout; memory uses the largest (100,1000,10000)",
    )
    parser.add_argument(
        "--stored",
        type=int,
        default=100_000,
        metavar="N",
        help="number of sessions in Redis for the scenario sessions (100000)",
    )
    parser.add_argument(
        "--sizes",
        type=_numbers,
        default=[64, 128, 1024, 16_384],
        metavar="N,N",
        help="sizes of messages for fanout, in bytes (64,128,1024,16384)",
    )
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def machine() -> dict[str, Any]:
    """The machine on which the figures were measured."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def print_result(console: Console, result: Result) -> None:
    table = Table(title=f"{result.name}: {result.about}", title_justify="left")
    for position, column in enumerate(result.columns):
        numeric = all(not isinstance(row[position], str) for row in result.rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in result.rows:
        table.add_row(*(show(cell) for cell in row))
    console.print(table)
    for check in result.checks:
        sign = "[green]ok[/]" if check.holds else "[red]FAILED[/]" if check.required else "[yellow]not met[/]"
        console.print(f"  {sign}  {check.text}", highlight=False)
    for note in result.notes:
        console.print(f"  note: {note}", highlight=False)
    console.print(f"  {result.seconds:.0f} s\n", highlight=False)


def main() -> int:
    options = parse()
    names = NAMES if "all" in options.scenario else list(dict.fromkeys(options.scenario))
    console, results, host = Console(), [], machine()
    if not console.is_terminal:
        console.width = 140
    console.print(f"{host['cores']} cores, Python {host['python']}, load {host['load']:.1f}", highlight=False)
    for position, name in enumerate(names, 1):
        start = time.monotonic()
        with Status("", console=console) as status:

            def say(text: str, position: int = position, name: str = name, status: Status = status) -> None:
                line = f"[{position}/{len(names)}] {name}: {text}"
                status.update(line)
                if not console.is_terminal:
                    console.print(line, markup=False, highlight=False)

            say("starting")
            result: Result = import_module(f"loadtest.scenarios.{name}").run(options, say)
        result.seconds = time.monotonic() - start
        results.append(result)
        print_result(console, result)
    if options.json:
        data = {"machine": host, "results": [result.as_json() for result in results]}
        options.json.write_text(json.dumps(data, indent=1))
    if options.html:
        options.html.write_text(render(host, results))
    failed = [result.name for result in results if result.failed]
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/]")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
