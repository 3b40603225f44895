"""What every part of one running node shares."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import socket
from collections.abc import Callable

from asgi_cluster.bus.lease import Clock, boot_clock
from asgi_cluster.exceptions import NotStarted
from asgi_cluster.ids import NodeId
from asgi_cluster.tasks import Failing, check_loop, running_asyncio_loop

__all__ = ["Node"]

logger = logging.getLogger("asgi_cluster")


class Node:
    """This process's membership in the cluster: its name, its loop and tasks, and whether it is started.

    ``needs_start`` is that of the backend. ``attach`` is called before each use of a node that needs no start
    and has none.
    """

    def __init__(
        self,
        *,
        label: str | None,
        listens: bool,
        deadline: float,
        needs_start: bool,
        attach: Callable[[], None],
        clock: Clock = boot_clock,
    ) -> None:
        self.listens = listens
        """False for a publisher: no registration, no sockets."""
        self.deadline = deadline
        """Seconds of Redis work for each operation."""
        self.needs_start = needs_start
        """Whether it has to be started before it is used outside of a request."""
        self.clock = clock
        self.loop: asyncio.AbstractEventLoop | None = None
        """The loop that started it; ``None`` while it is not started."""
        self.tasks: asyncio.TaskGroup | None = None
        """For tasks of ``loop``; ``None`` while it is not started."""
        self.failing: Failing = {}
        """Background work that has failed and is started again."""
        self.draining = False
        """Whether its sockets are being closed, and new ones are closed at once."""
        self._label = label
        self._attach = attach
        self._id: NodeId | None = None
        self._logged_unstarted = False

    @property
    def id(self) -> NodeId:
        """Its name in the cluster, ``label-pid-random``."""
        return self._id or self.renew()

    @property
    def crosses_loops(self) -> bool:
        """Whether messages may arrive on another thread than that of a socket's loop. They do where no start
        binds the node to a loop (``memory://``).
        """
        return not self.needs_start

    @property
    def current_id(self) -> NodeId | None:
        """``id``, or ``None`` before it was first used."""
        return self._id

    def renew(self) -> NodeId:
        """A new ``id``."""
        # Made at start and not at construction: workers that are forked afterwards must not share a name.
        label = self._label or re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:64] or "node"
        self._id = NodeId(f"{label}-{os.getpid()}-{secrets.token_hex(4)}")
        return self._id

    @property
    def started(self) -> bool:
        """Whether it was started and not stopped."""
        return self.tasks is not None

    def ensure_started(self, action: str) -> None:
        """Raises ``NotStarted`` when ``action`` needs a start, ``RuntimeError`` on another loop than the one
        that did it. Attaches a ``memory://`` node that has no start.

        A started ``memory://`` cluster could be used from any loop, and refuses what Redis would refuse: a
        test is to find what production would. Only a loop that does not run any more has nothing to be used
        on.
        """
        if self.tasks is not None:
            if not self.crosses_loops or (self.loop is not None and self.loop.is_running()):
                check_loop(self.loop)
            return
        running_asyncio_loop()
        if self.needs_start:
            raise NotStarted(action)
        if not self._logged_unstarted:
            self._logged_unstarted = True
            logger.info(
                "memory:// is used without a start; with Redis that is NotStarted outside of requests"
            )
        self._attach()

    def __repr__(self) -> str:
        return f"<Node {self._id or 'without name'}, {'started' if self.started else 'not started'}>"
