"""Everything of redis-py that is used and is not its public API, in one place.

``tests/bus/test_redis_compat.py`` checks each of it with redis-py's own parser and with hiredis, and says
what to do when one breaks.

An ``asyncio.Protocol`` with ``hiredis.Reader`` would need none of it. A message that was published and
received took 55 µs of CPU with redis-py's parser, 19 µs with hiredis under redis-py, and 9 µs with that
protocol (50 at a time, 128 bytes, Python 3.11); one at a time the three are within noise. It is not done,
because ``hiredis`` would be required, or a second parser kept beside it, and TLS, unix sockets, credential
providers and the handshake would have to be written here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ssl import SSLContext
from typing import Any

from redis.asyncio.connection import AbstractConnection, SSLConnection

__all__ = ["ContextConnection", "receive_pushes", "writer_of"]


def receive_pushes(
    connection: AbstractConnection, handler: Callable[[Sequence[Any]], Awaitable[Any]]
) -> None:
    """Call ``handler`` with every push, inside the ``read_response(push_request=True)`` that has parsed it.

    That call returns what ``handler`` returns. The connection must be open.
    """
    parser: Any = connection._parser
    parser.set_pubsub_push_handler(handler)


def writer_of(connection: AbstractConnection) -> asyncio.StreamWriter:
    """Where commands are written, several in one write. The connection must be open."""
    writer = connection._writer
    assert writer is not None
    return writer


class ContextConnection(SSLConnection):
    """redis-py makes a TLS context of its own from file names; this one takes the application's."""

    def __init__(self, context: SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self._context = context

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "ssl": self._context}
