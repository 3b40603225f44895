"""``send`` for one HTTP response."""

from __future__ import annotations

import logging
import sys

from starlette.types import Message, Receive, Scope, Send

from asgi_cluster.asgi.headers import SessionHeaders
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import BusUnavailable, SessionConflict, StoreUnavailable
from asgi_cluster.sessions.session import Session

__all__ = ["Response", "error_of_ours", "refuse"]

Headers = list[tuple[bytes, bytes]]

_CORS = (b"access-control-allow-origin", b"access-control-allow-credentials", b"vary")

logger = logging.getLogger("asgi_cluster.middleware")


class Response:
    """Saves the session before the headers go out, or answers in place of the app when that fails."""

    _failed = False
    started = False
    replaced = False
    saved = False

    def __init__(self, headers: SessionHeaders, scope: Scope, send: Send, session: Session) -> None:
        self._headers = headers
        self._scope = scope
        self._send = send
        self._session = session

    async def message(self, message: Message) -> None:
        """ASGI ``send``."""
        if self.started or message["type"] != "http.response.start":
            if not self.replaced:
                await self._send(message)
            return
        session = self._session
        if message["status"] == 500:
            error = self._uncaught()
            if error is not None:
                await self.replace(error, message)
                return
        if not self._failed:
            try:
                scope_key = self._headers.scope_key
                if scope_key is not None and self._scope.get(scope_key) is not session:
                    self._headers.adopt(self._scope, session)
                committer = session.service.committer
                if committer.due(session):
                    await committer.commit(session)
            except (StoreUnavailable, SessionConflict) as failed:
                await self.replace(failed, message)
                return
            except Exception:
                # The app's own error handling answers, and must not run into the same error again.
                self._failed = True
                raise
            self.saved = True
        self.started = True
        await self._send(self._headers.with_cookie(self._scope, session, message))
        session.work.phase = "sealed"

    def _uncaught(self) -> StoreUnavailable | BusUnavailable | SessionConflict | None:
        """The error of this package that the app did not catch, and that its 500 is about."""
        handled, raised = sys.exception(), self._session.work.raised
        if handled is None:
            # This framework does not answer while it handles the error. ``raised`` does not name errors that
            # the app caught and made good.
            return raised
        # Most frameworks send their 500 while they handle the error, some in an exception of their own.
        while handled is not None:
            if (ours := error_of_ours(handled)) is not None:
                return ours
            handled = handled.__cause__ or handled.__context__
        return None

    async def replace(
        self, error: StoreUnavailable | BusUnavailable | SessionConflict, message: Message | None = None
    ) -> None:
        """Answer in place of the app: 503 with Retry-After, or 409. The CORS headers of ``message``, the
        app's own answer, are kept.
        """
        self.started = self.replaced = True
        await self._session.service.logins.discard_unsent(self._session)
        cors = [header for header in (message or {}).get("headers", ()) if header[0].lower() in _CORS]
        if not any(name.lower() == _CORS[0] for name, _ in cors):
            cors = self._headers.cors(self._scope)
        await _answer(self._send, error, cors)


async def refuse(
    headers: SessionHeaders, scope: Scope, receive: Receive, send: Send, error: StoreUnavailable
) -> None:
    """Answer a request, or the handshake of a WebSocket, that is not given to the app at all."""
    if scope["type"] == "http":
        await _answer(send, error, headers.cors(scope))
        return
    logger.warning("closed a WebSocket with %d: %s", CloseCode.STORE_UNAVAILABLE, error)
    await receive()
    # Browsers see no code on a handshake that is refused.
    await send({"type": "websocket.accept", "subprotocol": None, "headers": []})
    code = int(CloseCode.STORE_UNAVAILABLE)
    await send({"type": "websocket.close", "code": code, "reason": "session store unavailable"})


async def _answer(
    send: Send, error: StoreUnavailable | BusUnavailable | SessionConflict, cors: Headers
) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store"), *cors]
    if isinstance(error, StoreUnavailable | BusUnavailable):
        logger.warning("answered 503: %s", error)
        what = b"session store" if isinstance(error, StoreUnavailable) else b"message bus"
        status, body = 503, b"The %s is unavailable. Please try again.\n" % what
        after = error.retry_after if isinstance(error, StoreUnavailable) else 1.0
        headers.append((b"retry-after", b"%d" % max(1, round(after))))
    else:
        status, body = 409, b"Another request changed the session meanwhile. Please try again.\n"
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_of_ours(error: BaseException | None) -> StoreUnavailable | BusUnavailable | SessionConflict | None:
    """``error``, if it is one that the middleware answers: 503 or 409. Of a task group's errors all have to
    be such; the first that means 503 counts, then the first.
    """
    if isinstance(error, StoreUnavailable | BusUnavailable | SessionConflict):
        return error
    if not isinstance(error, BaseExceptionGroup):
        return None
    ours = [found for each in error.exceptions if (found := error_of_ours(each)) is not None]
    if len(ours) < len(error.exceptions):
        return None
    return next((each for each in ours if not isinstance(each, SessionConflict)), ours[0])
