"""The session as the dict that an app takes it for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asgi_cluster import Cluster, Session, get_session
from tests.sessions.app import client_for

pytestmark = pytest.mark.quick

START = {"a": 1, "b": [1, 2], "c": "text"}

READS: dict[str, Callable[[Any], Any]] = {
    "item": lambda data: data["a"],
    "get": lambda data: (data.get("a"), data.get("x"), data.get("x", 5)),
    "contains": lambda data: ("a" in data, "x" in data),
    "iter": lambda data: sorted(data),
    "len": len,
    "bool": bool,
    "equal": lambda data: (data == START, data == {}, data != {}),
    "keys": lambda data: sorted(data.keys()),
    "values": lambda data: len(data.values()),
    "items": lambda data: sorted(data.items(), key=lambda item: item[0]),
    "copy": lambda data: (data.copy(), type(data.copy())),
    "or": lambda data: data | {"d": 4},
    "or from the right": lambda data: {"a": 0, "d": 4} | data,
    "dict": dict,
    "unpacked": lambda data: {**data},
    "pop of what is missing": lambda data: data.pop("x", None),
    "setdefault of what is there": lambda data: data.setdefault("a", 5),
}

WRITES: dict[str, Callable[[Any], Any]] = {
    "item": lambda data: data.__setitem__("d", 4),
    "del": lambda data: data.__delitem__("a"),
    "pop": lambda data: data.pop("a"),
    "setdefault": lambda data: data.setdefault("d", 4),
    "update": lambda data: data.update({"a": 2}, d=4),
    "update with pairs": lambda data: data.update([("a", 2), ("d", 4)]),
    "in place": lambda data: data.__ior__({"d": 4}),
    "nested": lambda data: data["b"].append(3),
    "nested in values": lambda data: next(value for value in data.values() if value == [1, 2]).append(3),
    "nested in items": lambda data: dict(data.items())["b"].append(3),
}

ERRORS: dict[str, Callable[[Any], Any]] = {
    "item": lambda data: data["x"],
    "del": lambda data: data.__delitem__("x"),
    "pop": lambda data: data.pop("x"),
    "hash": hash,
}


async def in_request(change: Callable[[Session], Any]) -> tuple[Any, bool, dict[str, Any]]:
    """What ``change`` returned in a request, whether the session was written, and what the next one sees."""
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = get_session(scope)
        match scope["path"]:
            case "/start":
                session.update(START)
            case "/change":
                found.append(change(session))
                found.append(session.version)
            case "/show":
                found.append(session.version)
                found.append(dict(session))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with client_for(Cluster("memory://"), app) as client:
        for path in ("/start", "/change", "/show"):
            assert (await client.get(path)).status_code == 200
    result, before, after, data = found
    return result, after > before, data


@pytest.mark.parametrize("name", READS)
async def test_reading_is_as_from_a_dict(name: str) -> None:
    """The same result as from a dict, and nothing is written."""
    assert await in_request(READS[name]) == (READS[name](dict(START)), False, START)


@pytest.mark.parametrize("name", WRITES)
async def test_writing_is_as_to_a_dict(name: str) -> None:
    """The same contents as those of a dict, saved and seen by the next request."""
    plain: dict[str, Any] = {"a": 1, "b": [1, 2], "c": "text"}
    WRITES[name](plain)
    _, written, data = await in_request(lambda session: str(WRITES[name](session)))
    assert written
    assert data == plain


async def test_popitem_takes_one_item() -> None:
    """Whichever: the order of a stored session's keys is not kept."""
    (key, value), written, data = await in_request(lambda session: session.popitem())
    assert written
    assert {**data, key: value} == START
    assert key not in data


@pytest.mark.parametrize("name", ERRORS)
async def test_error_is_that_of_a_dict(name: str) -> None:
    """What a dict refuses is refused in the same way, and changes nothing."""
    with pytest.raises((KeyError, TypeError)) as plain:
        ERRORS[name](dict(START))

    def attempt(session: Session) -> None:
        with pytest.raises(plain.type):
            ERRORS[name](session)

    assert await in_request(attempt) == (None, False, START)
