"""From a session to the headers of a response: what the app left in the scope, ``Set-Cookie``, ``Vary``."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import msgspec
from starlette.types import Message, Scope

from asgi_cluster.arguments import described
from asgi_cluster.compat.litestar import is_cleared
from asgi_cluster.sessions.service import SessionService
from asgi_cluster.sessions.session import Session
from asgi_cluster.sockets.origin import Origins

__all__ = ["SessionHeaders"]

logger = logging.getLogger("asgi_cluster.middleware")

_VARY = (b"vary", b"Cookie")


class SessionHeaders:
    """Shared by all responses and handshakes of one middleware."""

    def __init__(self, service: SessionService, origins: Origins) -> None:
        self._origins = origins
        self._cookie = service.cookie
        self._warned = False
        self.scope_key = service.config.scope_key

    def adopt(self, scope: Scope, session: Session) -> None:
        """Take over what the app put under the public scope key.

        Raises:
            TypeError: an object that is no dict: data of the app's, or another library's session.
        """
        if self.scope_key is None:
            return
        current = scope.get(self.scope_key)
        if current is session:
            return
        if type(current) is dict:
            session.replace(current)
        elif is_cleared(current):
            session.clear()
        elif (cure := _as_dict(current)) is not None:
            raise TypeError(
                f"scope[{self.scope_key!r}] was set to {described(current)}, and only a dict can be "
                f"stored as the session: {cure}"
            )
        elif current is not None:
            raise TypeError(
                f"scope[{self.scope_key!r}] was replaced by a {type(current).__module__}."
                f"{type(current).__name__}: another session middleware is inside ClusterMiddleware. "
                "Remove it, or set SessionConfig(scope_key=None) and use get_session()."
            )
        scope[self.scope_key] = session

    def cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """What lets a page of another origin read an answer of the middleware's own."""
        return self._origins.cors(scope)

    def _warn_insecure(self, scope: Scope) -> None:
        """Once: a Secure cookie leaves over plain http, and most clients will not send it back."""
        if self._cookie.secure and scope.get("scheme") in ("http", "ws") and not self._warned:
            self._warned = True
            logger.warning(
                "a Secure session cookie was set over plain http: clients other than browsers on localhost "
                "will not send it back. Behind a TLS proxy let the server trust its X-Forwarded-Proto; "
                "for tests use base_url='https://…'."
            )

    def with_cookie(self, scope: Scope, session: Session, message: Message) -> Message:
        """``message`` with the session's cookie, and ``Vary: Cookie`` if the app looked at the session."""
        cookie = session.work.cookie_header(self._cookie)
        if cookie is None and not session.accessed:
            return message
        headers = [*message.get("headers", ())]
        if cookie is not None:
            headers.append(cookie)
            self._warn_insecure(scope)
        if message["type"] != "websocket.accept":
            for header in headers:
                if len(header[0]) == 4 and header[0].lower() == b"vary":
                    _vary(headers, header)
                    break
            else:
                headers.append(_VARY)
        return {**message, "headers": headers}


def _as_dict(value: Any) -> str | None:
    """How to get a dict from data that the app put in place of the session; ``None`` when it is no data."""
    if isinstance(value, msgspec.Struct):
        return "pass msgspec.to_builtins(value)."
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "pass dataclasses.asdict(value)."
    if hasattr(value, "model_dump"):
        return "pass value.model_dump()."
    if type(value).__module__ == "builtins" and value is not None:
        return "pass a dict with it under a name of its own."
    return None


def _vary(headers: list[tuple[bytes, bytes]], header: tuple[bytes, bytes]) -> None:
    key, value = header
    names = [name.strip().lower() for name in value.split(b",")]
    if b"cookie" not in names and b"*" not in names:
        headers[headers.index(header)] = (key, value + b", Cookie" if value else b"Cookie")
