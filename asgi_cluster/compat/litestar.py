"""What is used of Litestar beyond ASGI."""

from __future__ import annotations

from typing import Any

__all__ = ["is_cleared"]


def is_cleared(session: Any) -> bool:
    """Whether ``scope["session"]`` holds the sentinel that Litestar's ``clear_session()`` puts there.

    Litestar is not imported for that: ``Empty`` is recognised by the module that defines it.
    """
    return type(session).__module__ == "litestar.types.empty"
