"""Whether ``memory://`` is used where it cannot work: by several processes."""

from __future__ import annotations

import logging
import multiprocessing
import os

from asgi_cluster.compat.gunicorn import has_forked_before

__all__ = ["UnsharedMemory"]

logger = logging.getLogger("asgi_cluster")

_CURE = "Set ASGI_CLUSTER_URL, for example to redis://localhost:6379/0"


class UnsharedMemory:
    """Warns once when a process without a URL, which therefore uses ``memory://``, is one of several."""

    def __init__(self, *, without_url: bool, listens: bool) -> None:
        self._may_be_wrong = without_url
        if without_url and not listens:
            self._may_be_wrong = False
            logger.warning(
                "listen=False without a URL: this cluster uses memory://, and its logouts and broadcasts "
                "reach no other process. %s",
                _CURE,
            )
        self.check()

    def check(self) -> None:
        """Check again: an app that is loaded before the fork has no siblings at that time."""
        if self._may_be_wrong and _has_siblings():
            self._may_be_wrong = False
            logger.warning(
                "this is a worker process, and memory:// is not shared: each of several workers has "
                "sessions and rooms of its own. %s",
                _CURE,
            )


def _has_siblings() -> bool:
    workers = os.environ.get("WEB_CONCURRENCY", "")
    if workers.isdigit() and int(workers) > 1:
        return True
    return multiprocessing.parent_process() is not None or has_forked_before()
