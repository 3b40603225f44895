"""Litestar's sentinel for a session that the app has cleared."""

from __future__ import annotations

from typing import Any

import pytest
from litestar import Request
from litestar.types.empty import Empty

from asgi_cluster.compat.litestar import is_cleared

pytestmark = pytest.mark.quick


def test_cleared_session_is_recognised() -> None:
    """``clear_session()`` of the installed Litestar leaves what the package takes for a logout."""
    scope: Any = {"type": "http", "session": {"cart": 1}}
    request: Request[Any, Any, Any] = Request(scope)
    request.clear_session()
    assert is_cleared(scope["session"]), (
        f"this Litestar's clear_session() leaves a {type(scope['session'])} in the scope: let "
        "compat/litestar.py recognise that one too. Until then a Litestar app that clears its session gets a "
        "TypeError about another session middleware, and the session does not end"
    )
    assert is_cleared(Empty)


def test_data_is_no_cleared_session() -> None:
    """Neither an empty dict nor ``None``."""
    assert not is_cleared({})
    assert not is_cleared(None)
