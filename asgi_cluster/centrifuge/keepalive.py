"""Whether a client is still there: the time that it has to connect, and pings."""

from __future__ import annotations

import asyncio
import random

from asgi_cluster.centrifuge.client import Client
from asgi_cluster.centrifuge.protocol import PING
from asgi_cluster.codes import CloseCode
from asgi_cluster.sockets.prepared import PreparedMessage

__all__ = ["Keepalive"]

_PING = PreparedMessage(PING)


class Keepalive:
    """Closes a client that does not connect in time, and one that does not answer a ping."""

    __slots__ = ("_awaits_pong", "_client", "_timer", "reading")

    def __init__(self, client: Client) -> None:
        self._client = client
        self._awaits_pong = False
        self._timer: asyncio.TimerHandle | None = None
        self.reading = True
        """False: nothing is read from the client, pongs neither, so that none is waited for."""

    def start(self) -> None:
        """The client has ``connect_timeout`` seconds from now."""
        loop, timeout = self._client.connection.socket.loop, self._client.services.config.connect_timeout
        self._timer = loop.call_later(timeout, self._client.end, CloseCode.STALE)

    def connected(self) -> None:
        """It has connected: pings begin."""
        self.stop()
        # The first one spread out, so that clients that came together are not pinged together for ever.
        first = self._client.services.config.ping_interval * random.uniform(0.5, 1.0)
        self._timer = self._client.connection.socket.loop.call_later(first, self._ping)

    def pong(self) -> None:
        """The client has answered."""
        self._awaits_pong = False

    def _ping(self) -> None:
        config, connection = self._client.services.config, self._client.connection
        self._awaits_pong = True
        connection.outbox.push(_PING)
        wait = min(config.pong_timeout, config.ping_interval)
        rest = config.ping_interval - wait
        self._timer = connection.socket.loop.call_later(wait, self._check_pong, rest)

    def _check_pong(self, rest: float) -> None:
        if self._awaits_pong and self.reading:
            self._client.end(CloseCode.NO_PONG)
        else:
            self._timer = self._client.connection.socket.loop.call_later(rest, self._ping)

    def stop(self) -> None:
        """The client is gone."""
        if self._timer is not None:
            self._timer.cancel()
