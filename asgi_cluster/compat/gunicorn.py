"""What is used of gunicorn beyond ASGI."""

from __future__ import annotations

import sys

__all__ = ["has_forked_before"]


def has_forked_before() -> bool:
    """Whether this process is a worker that gunicorn has forked after another one.

    A worker is forked with the list of those that were forked before it. So all but the first find one there.
    """
    arbiter = getattr(sys.modules.get("gunicorn.arbiter"), "Arbiter", None)
    return bool(getattr(arbiter, "WORKERS", None))
