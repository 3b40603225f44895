"""The lifetime of a node: start, background work, drain and stop."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager, ExitStack

from asgi_cluster.backends.port import Backend
from asgi_cluster.config import DEFAULT_DRAIN, RealtimeConfig
from asgi_cluster.dispatch import Dispatch
from asgi_cluster.exceptions import ClusterError
from asgi_cluster.lifetime.draining import Drainer, draining_on_sigterm, reloads
from asgi_cluster.lifetime.lazy_start import LazyStart
from asgi_cluster.node import Node
from asgi_cluster.rooms.rooms import Rooms
from asgi_cluster.sessions.revalidation import Revalidator
from asgi_cluster.sessions.tombstones import Tombstones
from asgi_cluster.sockets.hub import Hub
from asgi_cluster.tasks import keep_running, running_asyncio_loop

__all__ = ["Supervisor"]

logger = logging.getLogger("asgi_cluster")

_DRAIN_EACH = 0.05  # seconds that a drain on SIGTERM takes for each socket, up to RealtimeConfig.drain in all


class Supervisor:
    """Owns the node's task group: connects to the backend, declares the room rules, runs the background work,
    and undoes that at the stop.
    """

    def __init__(
        self,
        node: Node,
        *,
        backend: Backend,
        dispatch: Dispatch,
        hub: Hub,
        rooms: Rooms,
        revalidator: Revalidator,
        tombstones: Tombstones,
        config: RealtimeConfig,
    ) -> None:
        self._node = node
        self._backend = backend
        self._dispatch = dispatch
        self._hub = hub
        self._rooms = rooms
        self._config = config
        self._background = {
            "verification": revalidator.run,
            "tombstones": tombstones.run,
            "room rules": rooms.retention.run,
        }
        self._task: asyncio.Task[None] | None = None
        self._stop: asyncio.Event | None = None
        self.drainer: Drainer | None = None
        """Holds SIGTERM back while the node is started; ``None`` where that is off or cannot be done."""
        self.lazy_start: LazyStart | None = LazyStart(self._begin, self.stop)
        """Starts the node for servers without lifespan; ``None`` once it has been started in another way."""

    @property
    def ready(self) -> bool:
        """See ``Cluster.ready``."""
        node = self._node
        # A task without a started node: it has ended without having been stopped.
        usable = node.started or not (node.needs_start or self._task is not None)
        return usable and not node.draining and not node.failing and self._backend.ready

    async def start(self) -> None:
        """See ``Cluster.__aenter__``."""
        lazy, self.lazy_start = self.lazy_start, None
        try:
            await self._begin()
        except BaseException:
            self.lazy_start = lazy
            raise

    async def _begin(self) -> None:
        loop = running_asyncio_loop()
        if self._task is not None and not self._task.done():
            raise RuntimeError("this cluster is already started")
        self._node.renew()
        self._node.draining = False
        started: asyncio.Future[None] = loop.create_future()
        # The one task that no group owns: it owns the group, so that start and stop may come from different
        # tasks.
        self._task = loop.create_task(self._run(started), name="asgi-cluster supervisor")
        try:
            await asyncio.shield(started)
        except BaseException:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
            raise

    async def stop(self, *exc_info: object) -> None:
        """See ``Cluster.__aexit__``."""
        task, self._task = self._task, None
        if task is None:
            return
        if not task.done():
            if self._stop is not None:
                self._stop.set()
            await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def drain(self, seconds: float) -> None:
        """See ``Cluster.drain``."""
        self._node.draining = True
        logger.info("draining %d sockets over %g s", len(self._hub), seconds)
        await self._hub.drain(seconds)

    async def _drain_on_signal(self) -> None:
        # A few sockets that come back at once are no crowd, and a restart should not wait for them.
        most = 0.0 if reloads() or self._hub.reloads() else self._config.drain or 0.0
        await self.drain(min(most, len(self._hub) * _DRAIN_EACH))

    async def _run(self, started: asyncio.Future[None]) -> None:
        self._stop = asyncio.Event()
        node = self._node
        try:
            async with self._connected(), asyncio.TaskGroup() as tasks:
                await self._rooms.retention.start()
                node.tasks, node.loop = tasks, asyncio.get_running_loop()
                with ExitStack() as stack:
                    if self._config.drain and node.listens:
                        level = logging.INFO if self._config.drain == DEFAULT_DRAIN else logging.WARNING
                        self.drainer = stack.enter_context(
                            draining_on_sigterm(self._drain_on_signal, tasks, level=level)
                        )
                    background = [
                        tasks.create_task(
                            keep_running(work, name=name, failing=node.failing), name=f"asgi-cluster {name}"
                        )
                        for name, work in self._background.items()
                    ]
                    logger.info("node %s started", node.id)
                    started.set_result(None)
                    try:
                        await self._stop.wait()
                    finally:
                        for task in background:
                            task.cancel()
                        node.tasks = node.loop = self.drainer = None
                        await self._hub.shutdown(timeout=self._config.close_timeout)
                logger.info("node %s stopped", node.id)
        except BaseException as error:
            if started.done():
                if self.lazy_start is not None and isinstance(error, asyncio.CancelledError):
                    await self._sign_off()
                if isinstance(error, Exception):
                    logger.critical("node %s has ended with an unexpected error", node.id, exc_info=error)
                raise
            # Every task group on the way has wrapped it; the caller that starts the cluster gets the error
            # itself.
            started.set_exception(_innermost(error))
            if not isinstance(error, Exception):
                raise
        finally:
            self._stop = None

    def _connected(self) -> AbstractAsyncContextManager[None]:
        node = self._node
        return self._backend.open(node.id, self._dispatch, listen=node.listens, failing=node.failing)

    async def _sign_off(self) -> None:
        # The loop ends and has cancelled everything, the connections too: sign off over new ones.
        try:
            async with asyncio.timeout(self._node.deadline), self._connected():
                logger.info("node %s stopped", self._node.id)
        except (ClusterError, TimeoutError) as error:
            reason = str(error) or f"no answer within {self._node.deadline:g} s"
            logger.info("node %s could not sign off: %s", self._node.id, reason)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
