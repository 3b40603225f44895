"""How a worker of gunicorn finds that it is one of several."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

from asgi_cluster.compat.gunicorn import has_forked_before

pytestmark = pytest.mark.quick

_CURE = (
    "compat/gunicorn.py reads the workers that were forked before this one from Arbiter.WORKERS, and this "
    "gunicorn {change}. Read them from where it keeps them now. Until then gunicorn's second worker on "
    "memory:// logs no warning that it shares nothing with the first"
)


class _Idle(BaseApplication):  # type: ignore[misc]
    def load_config(self) -> None:
        """Nothing but the defaults."""

    def load(self) -> Callable[..., Any]:
        """No app is loaded here."""
        raise NotImplementedError


def test_worker_finds_those_that_were_forked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the installed gunicorn puts a worker that it has forked, there the next one is looked for."""
    assert isinstance(vars(Arbiter).get("WORKERS"), dict), _CURE.format(change="has no such dict")
    monkeypatch.setattr(Arbiter, "WORKERS", {})
    monkeypatch.setattr("os.fork", lambda: 4242)  # the arbiter's side of it
    arbiter = Arbiter(_Idle())
    arbiter.pid = os.getpid()
    assert not has_forked_before()
    arbiter.spawn_worker()
    assert has_forked_before(), _CURE.format(change="puts a forked worker elsewhere")
    for worker in Arbiter.WORKERS.values():
        worker.tmp.close()


def test_without_gunicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never imported for this."""
    monkeypatch.delitem(sys.modules, "gunicorn.arbiter")
    assert not has_forked_before()
