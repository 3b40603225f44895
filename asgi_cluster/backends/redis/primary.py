"""One primary: where it is at the moment, and a check that it is the server that the URL means."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from redis.exceptions import ResponseError

from asgi_cluster.backends.redis.connection import MultiplexedConnection, OnPush
from asgi_cluster.backends.redis.errors import ConnectionBroken

__all__ = ["Dial", "Primary"]

Dial = Callable[[OnPush | None], Awaitable[MultiplexedConnection]]
"""Opens a connection to the primary, wherever it is now; raises ``ConnectionBroken``."""

_MODES = {"standalone": "redis://", "sentinel": "redis+sentinel://", "cluster": "redis+cluster://"}


class Primary:
    """A server that takes writes. ``mode`` is what ``HELLO`` must say: ``standalone`` or ``cluster``.

    ``minimum`` is the oldest version that will do.
    """

    def __init__(
        self,
        dial: Dial,
        name: Callable[[], str],
        *,
        mode: str = "standalone",
        minimum: tuple[int, int] = (6, 2),
    ) -> None:
        self.dial = dial
        self._name = name
        self._mode = mode
        self._minimum = minimum

    @property
    def name(self) -> str:
        """Where it is, for people."""
        return self._name()

    async def check_server(self, connection: MultiplexedConnection) -> str:
        """Its run id. Replies are read already.

        Raises:
            ConnectionBroken: it is too old, or no primary, or of another kind.
        """
        try:
            hello, info = connection.send("HELLO", "3"), connection.send("INFO", "server")
            answer = await hello
            facts: dict[str, str] = dict(
                line.split(":", 1) for line in (await info).decode().splitlines() if ":" in line
            )
        except ResponseError as error:
            raise ConnectionBroken(f"the server does not say what it is: {error}", sent=False) from error
        version = facts.get("redis_version", "0")
        if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < self._minimum:
            needed = "{}.{}".format(*self._minimum)
            raise ConnectionBroken(
                f"the server is too old: Redis {needed} or newer is needed, this is {version}", sent=False
            )
        mode = answer[b"mode"].decode()
        if mode != self._mode:
            raise ConnectionBroken(
                f"this server is in {mode} mode: its URL starts with {_MODES.get(mode)}", sent=False
            )
        role = answer[b"role"].decode()
        if role != "master":
            # Behind a name that moves with the primary this passes; until then nothing written here would
            # last.
            raise ConnectionBroken(f"this server is a {role}, not a primary", sent=False)
        return facts.get("run_id", "")

    def __repr__(self) -> str:
        return f"<Primary {self.name}>"
