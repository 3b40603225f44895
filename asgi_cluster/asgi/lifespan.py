"""The cluster's lifetime in the ASGI lifespan protocol: before the app starts, until after it has stopped."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_cluster.cluster import Cluster
from asgi_cluster.exceptions import ClusterError

__all__ = ["Lifespan"]

logger = logging.getLogger("asgi_cluster.lifespan")


class Lifespan:
    """One run of the lifespan protocol (ASGI lifespan specification 2.0) around ``app``.

    Answered here when the app has no lifespan: some raise (Django), some just return.
    """

    def __init__(self, app: ASGIApp, cluster: Cluster) -> None:
        self._app = app
        self._cluster = cluster
        self._first: Message | None = None
        self._started = False
        self._stopped = False
        self._stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._first = await receive()
        self._receive, self._send = receive, send
        async with AsyncExitStack() as stack:
            self._stack = stack
            if not self._cluster.started:  # by hand, or by another middleware around this one
                try:
                    await stack.enter_async_context(self._cluster)
                except Exception as error:
                    # Whatever the error is: a server that gets an exception takes the app for one without
                    # lifespan, and serves.
                    reason = str(error) or type(error).__name__
                    logger.error(
                        "the cluster could not be started: %s",
                        reason,
                        exc_info=None if isinstance(error, ClusterError) else error,
                    )
                    await send({"type": "lifespan.startup.failed", "message": reason})
                    return
            try:
                await self._app(scope, self._app_receive, self._app_send)
            except Exception as error:
                if self._started:
                    raise
                logger.debug("the app has no lifespan (%s): answering for it", type(error).__name__)
            if self._stopped:
                return
            if not self._started:
                await send({"type": "lifespan.startup.complete"})
            if not self._stopping:
                await receive()
            await stack.aclose()
            await send({"type": "lifespan.shutdown.complete"})

    async def _app_receive(self) -> Message:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        message = await self._receive()
        self._stopping = True
        return message

    async def _app_send(self, message: Message) -> None:
        kind = message["type"]
        self._started = True
        if kind in ("lifespan.shutdown.complete", "lifespan.shutdown.failed", "lifespan.startup.failed"):
            self._stopped = True
            await self._stack.aclose()
        await self._send(message)
