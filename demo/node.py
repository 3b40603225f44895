"""One node of the demo: a uvicorn that answers on the shared port and on one of its own."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading

import uvicorn

from demo.app import make_app
from demo.lifeline import watch

__all__ = ["listen", "main"]

STOP_WITHIN = 5.0


def listen(host: str, port: int, *, shared: bool) -> socket.socket:
    """A listening socket. With ``shared`` the system spreads connections over all such sockets."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(1024)
    except BaseException:
        sock.close()
        raise
    return sock


def main(label: str, host: str, shared_port: int, own_port: int) -> int:
    """Serve until SIGTERM, or until the supervisor has ended; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format=f"{label}: %(name)s: %(message)s")
    try:
        sockets = [listen(host, shared_port, shared=True), listen(host, own_port, shared=False)]
    except OSError as error:
        print(
            f"{label}: cannot listen on port {shared_port} or {own_port}: {error.strerror}", file=sys.stderr
        )
        return 1
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(os.environ["DEMO_REDIS"], label=label),
            loop="asyncio",  # `uv run` installs no other loop for the demo
            http="h11",
            ws="websockets-sansio",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=2,
        )
    )

    def orphaned() -> None:
        server.should_exit = True
        # It has to end after the supervisor in any case, also when a request does not finish.
        timer = threading.Timer(STOP_WITHIN, os._exit, [1])
        timer.daemon = True
        timer.start()

    watch(orphaned)
    server.run(sockets=sockets)
    return 0 if server.started else 1


if __name__ == "__main__":
    # The Redis URL comes in the environment: it may contain a password, and every user of the machine can
    # read command lines.
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
