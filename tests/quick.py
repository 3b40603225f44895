"""Which tests are quick: those that start no server, no browser and no process of their own.

Nobody marks them by hand: what a test and its fixtures call is followed through the modules of the tests.
"""

from __future__ import annotations

import inspect
import socket
import subprocess
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any, NoReturn

import pytest

_STARTERS = {f"tests.support.{name}" for name in ("machine", "nodes", "proxy", "servers", "topologies")}
_SLOW = (
    "tests/apps",
    "tests/loadtest",
    "tests/model",
    "tests/realtime/test_fuzz.py",
    "tests/realtime/test_servers.py",
    "tests/contract/test_properties.py",
)
"""Other servers than those above, or work of many seconds."""
_CALLS = {"start_server", "create_server", "create_subprocess_exec", "getfixturevalue"}
_KINDS = {"redis", "valkey", "debian", "sentinel", "cluster", "rooms apart"}
"""Of backends, as parameters: memory is the one without a server."""


def is_quick(item: pytest.Item) -> bool:
    """Whether nothing that ``item`` reaches starts anything."""
    if not isinstance(item, pytest.Function) or item.get_closest_marker("faults"):
        return False
    if item.nodeid.startswith(_SLOW):
        return False
    call = getattr(item, "callspec", None)
    parameters = {} if call is None else call.params
    if any(isinstance(value, str) and value in _KINDS for value in parameters.values()):
        return False
    # These ask for a server only where their parameter says so.
    lazy = {"cluster_url", "url_of"}
    fixtures = item._fixtureinfo.name2fixturedefs
    used = [fixtures[name][-1].func for name in item.fixturenames if name in fixtures and name not in lazy]
    known: set[Any] = set()
    return not any(_starts(function, known) for function in (item.function, *used))


def _starts(thing: Any, known: set[Any]) -> bool:
    if isinstance(thing, ModuleType):
        return thing is subprocess
    if isinstance(thing, dict | list | tuple):
        return any(_starts(item, known) for item in (thing.values() if isinstance(thing, dict) else thing))
    place = getattr(thing, "__module__", None) or ""
    if place in _STARTERS:
        return callable(thing)
    if not place.startswith("tests.") or place == __name__ or id(thing) in known:
        return False
    known.add(id(thing))
    if inspect.isclass(thing):
        return any(_starts(member, known) for member in vars(thing).values() if callable(member))
    function = inspect.unwrap(thing) if callable(thing) else thing
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    if not _CALLS.isdisjoint(_names(code)):
        return True
    return any(
        _starts(function.__globals__[name], known) for name in _names(code) if name in function.__globals__
    )


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def refuse_to_start(patch: pytest.MonkeyPatch) -> None:
    """Make a test fail that starts something all the same."""

    def refused(what: str) -> Callable[..., NoReturn]:
        def refuse(*args: object, **kwargs: object) -> NoReturn:
            raise AssertionError(f"a test of the quick tier {what}: see tests/quick.py")

        return refuse

    patch.setattr(subprocess, "Popen", refused("starts a process"))
    patch.setattr(socket.socket, "listen", refused("starts a server"))
