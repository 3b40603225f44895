"""``python -m demo``: three nodes, one session, one board."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from demo.supervisor import StartFailed, Supervisor, check_ports

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="A shared board on several nodes behind one port. Ctrl-C stops everything it started.",
    )
    parser.add_argument(
        "--port", type=_port, default=8000, help="the shared port; the nodes take the ones after it (8000)"
    )
    parser.add_argument("--nodes", type=_nodes, default=3, help="how many nodes, 1 to 16 (3)")
    parser.add_argument(
        "--redis",
        metavar="URL",
        default=os.environ.get("REDIS_URL") or None,
        help="a Redis or Valkey server: redis://, rediss:// or unix:// (REDIS_URL, else an embedded Valkey)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen on; 0.0.0.0 also for other devices, such as your phone (127.0.0.1)",
    )
    options = parser.parse_args(arguments)
    if options.port + options.nodes > 65_535:
        parser.error(f"--port {options.port} is too high: the {options.nodes} nodes use the ports after it")
    if options.redis is not None and not options.redis.startswith(("redis://", "rediss://", "unix://")):
        parser.error("--redis (or REDIS_URL) has to start with redis://, rediss:// or unix://")
    try:
        check_ports(options.host, options.port, options.nodes)
        asyncio.run(_run(options))
    except StartFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


async def _run(options: argparse.Namespace) -> None:
    supervisor = Supervisor(
        host=options.host,
        port=options.port,
        nodes=options.nodes,
        redis=options.redis,
        say=lambda line: print(line, flush=True),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, supervisor.stop)
    await supervisor.run()


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65_535:
        raise argparse.ArgumentTypeError("a port is a number from 1 to 65535")
    return port


def _nodes(text: str) -> int:
    nodes = int(text)
    if not 1 <= nodes <= 16:
        raise argparse.ArgumentTypeError("the number of nodes is 1 to 16")
    return nodes


if __name__ == "__main__":
    sys.exit(main())
