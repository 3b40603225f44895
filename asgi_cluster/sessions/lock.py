"""A session's lock: one request at a time, with fresh data."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, new_token
from asgi_cluster.sessions.data import SessionData
from asgi_cluster.sessions.service import SessionService
from asgi_cluster.sessions.unit_of_work import UnitOfWork

__all__ = ["locked"]

logger = logging.getLogger("asgi_cluster.sessions")

_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.1


@asynccontextmanager
async def locked(
    service: SessionService, session: SessionData, *, wait: float, hold: float
) -> AsyncIterator[None]:
    """See ``Session.lock``."""
    session.mark_accessed()
    work, node = session.work, service.node
    if work.record is None:
        yield
        return
    handle, token = work.record.handle, new_token()
    await _take(service, work, handle, token, wait, hold)
    try:
        work.next_deadline(node)
        if work.record is not None:
            await service.reload(session, work.record)
        yield
        work.next_deadline(node)
        session.mark_accessed()
        await service.committer.commit(session, renew_cookie=False)
    finally:
        work.next_deadline(node)
        try:
            with work.spending(node) as timeout:
                await service.store.unlock(handle, token=token, timeout=timeout)
        except StoreUnavailable as error:
            logger.warning(
                "the lock of session %s could not be given back, it expires within %g s: %s",
                handle,
                hold,
                error.reason,
            )


async def _take(
    service: SessionService, work: UnitOfWork, handle: Handle, token: str, wait: float, hold: float
) -> None:
    node, pause = service.node, _FIRST_PAUSE
    give_up_at = node.clock() + wait
    while True:
        work.next_deadline(node)
        with work.spending(node) as timeout:
            if await service.store.lock(handle, token=token, hold=hold, timeout=timeout):
                return
        if node.clock() >= give_up_at:
            raise TimeoutError(f"the lock of session {handle} was not free within {wait:g} s")
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 2, _LONGEST_PAUSE)
