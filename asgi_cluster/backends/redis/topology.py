"""Which primary has which key: the port that a server, a Sentinel service and a Redis Cluster fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.scripts import Script
from asgi_cluster.tasks import Failing

__all__ = ["Commands", "Primaries", "Topology"]


class Commands(Protocol):
    """Commands, each to the primary that has its key."""

    sharded: bool
    """Redis Cluster: channels belong to slots, publish with SPUBLISH."""

    async def call(self, key: str, *args: str | bytes | int, timeout: float) -> Any:
        """One command, to the primary that has ``key``. Replies are bytes, int, list, dict or ``None``.

        Only what provably did not run is tried again, while there is time.

        Raises:
            StoreUnavailable: no reply within ``timeout`` seconds, or the server refused.
        """
        ...

    async def run(
        self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int], *, timeout: float
    ) -> Any:
        """A script, all of whose keys share a slot. As ``call``."""
        ...

    def post(self, key: str, *args: str | bytes | int) -> bool:
        """One command whose reply is not needed, to the primary that has ``key``; False when it could not be
        sent.
        """
        ...

    def run_id(self, key: str) -> str:
        """The run id of the server that has ``key``: another one has not necessarily the same last writes.

        Raises:
            StoreUnavailable: not connected.
        """
        ...

    @property
    def answering(self) -> bool:
        """Whether every primary is connected and has answered lately."""
        ...


class Primaries(Protocol):
    """Where keys and channels are, for the subscribers."""

    def primaries(self) -> Sequence[Primary]:
        """All of them, as of the last look."""
        ...

    def home(self, key: str) -> Primary | None:
        """The primary that has ``key`` (or a channel), as of the last look; ``None`` while none has it."""
        ...

    def tag_at(self, primary: Primary) -> str | None:
        """A hash tag whose keys are on ``primary``; ``None`` when it has no slots."""
        ...

    def watch(self, changed: Callable[[], None] | None) -> None:
        """``changed`` is called whenever homes may have changed."""
        ...

    def refresh_soon(self) -> None:
        """A command was redirected or a connection cut: look again where everything is, soon. Never waits."""
        ...

    def reconnect_now(self, primary: Primary) -> None:
        """A subscriber has reached ``primary`` again: its client need not wait before it connects."""
        ...


class Topology(Commands, Primaries, Protocol):
    """One or more primaries that together hold all keys."""

    def opened(self, failing: Failing | None = None) -> AbstractAsyncContextManager[None]:
        """Connected while entered.

        Raises ``StoreUnavailable`` on entering: cannot be reached, refuses the login, is too old.
        """
        ...
