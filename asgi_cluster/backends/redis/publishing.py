"""Publishing on Redis."""

from __future__ import annotations

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.single import Topology
from asgi_cluster.exceptions import BusUnavailable, StoreUnavailable

__all__ = ["check_right", "publish"]


async def publish(topology: Topology, names: Names, channel: str, payload: bytes, timeout: float) -> None:
    """One message to one channel.

    Raises:
        BusUnavailable: it could not be sent, or no reply came in ``timeout`` seconds.
    """
    try:
        await topology.call(channel, names.publish, channel, payload, timeout=timeout)
    except StoreUnavailable as error:
        raise BusUnavailable(error.reason, outcome_unknown=error.outcome_unknown) from error


async def check_right(topology: Topology, names: Names, channel: str, payload: bytes, what: str) -> None:
    """Publish a message that is ignored: a right that is missing should stop the start, and not the first
    logout.

    Raises:
        StoreUnavailable: it is missing, or the server did not answer.
    """
    try:
        await publish(topology, names, channel, payload, 1.0)
    except BusUnavailable as error:
        raise StoreUnavailable(f"cannot publish {what}: {error.reason}") from error
