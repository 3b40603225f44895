"""Free ports for servers that are started and stopped again; the tests use them too."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from itertools import cycle, islice

__all__ = ["free_port"]

# Below the ports that the system uses for outgoing connections: such a connection could take the port of a
# server that is being started again. In random order, so that two runs at the same time do not collide.
_PORTS = range(10_000, 32_000)
_candidates = cycle(random.sample(_PORTS, len(_PORTS)))


def free_port() -> int:
    """A TCP port on loopback that is free right now, and that this process has not been given before: a
    server that is still starting does not listen on its port yet.
    """
    for port in islice(_candidates, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port from {_PORTS.start} to {_PORTS.stop - 1}")
