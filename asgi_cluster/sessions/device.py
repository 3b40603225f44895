"""What a login says of the device it came from, for the user's list of sessions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["device_of"]

_MAX_AGENT = 256
_MAX_ADDRESS = 64


def device_of(scope: Mapping[str, Any]) -> tuple[str, str]:
    """The User-Agent (at most 256 characters) and the client's address, each ``""`` when unknown.

    The address is the ASGI server's: behind a proxy it is the visitor's only if the server trusts the proxy's
    headers.
    """
    agent = ""
    for key, value in scope.get("headers", ()):
        if key == b"user-agent":
            agent = value.decode("latin-1")[:_MAX_AGENT]
            break
    client = scope.get("client")
    return agent, str(client[0])[:_MAX_ADDRESS] if client else ""
