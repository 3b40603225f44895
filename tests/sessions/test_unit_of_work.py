"""The state of one request's session, from its read to its commit, without I/O."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, UserId, new_handle, secret_hash
from asgi_cluster.node import Node
from asgi_cluster.sessions.changes import carried_over
from asgi_cluster.sessions.codec import encode_value
from asgi_cluster.sessions.config import CookieConfig, SessionConfig
from asgi_cluster.sessions.cookies import Cookie
from asgi_cluster.sessions.deadline import Deadline
from asgi_cluster.sessions.store import Record
from asgi_cluster.sessions.unit_of_work import UnitOfWork

COOKIE = Cookie(CookieConfig())


def record(fields: dict[str, Any] | None = None, **changes: Any) -> Record:
    """A stored session with an idle timeout of 100 s, just used."""
    values: dict[str, Any] = {
        "handle": new_handle(None),
        "secret": secret_hash(b"secret"),
        "previous": None,
        "previous_for": 0.0,
        "user": None,
        "version": 3,
        "write_id": "w3",
        "created_at": 0.0,
        "expires_in": 100.0,
        "absolute_in": 1000.0,
        "idle": 100.0,
        "persistent": False,
        "fields": {key: encode_value(key, value) for key, value in (fields or {}).items()},
    }
    return Record(**(values | changes))


def bound(stored: Record | None = None, **options: Any) -> UnitOfWork:
    """Of a request that has read a session at 0 s."""
    work, stored = UnitOfWork({}, SessionConfig(**options)), stored or record()
    work.bind(stored, stored.expires_in)
    return work


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def node(clock: Clock) -> Node:
    return Node(
        label="n",
        listens=True,
        deadline=1.0,
        needs_start=False,
        attach=lambda: None,
        clock=clock,
    )


# What changed


def test_changes_are_compared_with_the_record() -> None:
    """Changed in place, assigned, removed; an assignment counts even when the value is the same."""
    work = bound(record({"same": 1, "list": [1], "gone": 2}))
    contents = {"same": 1, "list": [1, 2], "new": 3}
    changed, removed = work.changes(contents)
    assert (sorted(changed), removed) == (["list", "new"], ["gone"])
    work.touch(["same", "never"])
    changed, removed = work.changes(contents)
    assert (sorted(changed), sorted(removed)) == (["list", "new", "same"], ["gone", "never"])


def test_more_than_max_bytes_is_refused() -> None:
    """Counted with what the request does not change."""
    work = bound(record({"old": b"x" * 90}), max_bytes=100)
    with pytest.raises(ValueError, match="max_bytes is 100"):
        work.changes({"old": b"x" * 90, "new": b"y" * 20})


def test_assignments_of_a_save_that_fails_are_still_to_be_saved() -> None:
    """With those that came while it was under way; a save that succeeds leaves only these."""
    work = bound()
    work.touch(["a"])

    def save_and_fail() -> None:
        with work.sending():
            assert work.touched == frozenset()
            work.touch(["b"])
            raise KeyError

    with pytest.raises(KeyError):
        save_and_fail()
    assert work.touched == {"a", "b"}
    with work.sending():
        work.touch(["c"])
    assert work.touched == {"c"}


def test_saved_changes_are_those_of_the_record_now() -> None:
    """The next comparison finds nothing; a write that changed nothing keeps version and write id."""
    work = bound(record({"a": 1, "b": 2}))
    contents = {"a": 5}
    work.saved(work.changes(contents), None, 10.0)
    assert work.record is not None
    assert (work.record.version, work.record.write_id) == (3, "w3")
    assert work.changes(contents) == ({}, [])
    assert work.expires_at == 110.0
    work.saved(({}, []), "w4", 20.0)
    assert (work.record.version, work.record.write_id) == (4, "w4")


def test_carry_over_leaves_the_own_keys_of_the_request() -> None:
    """What others wrote and removed since the read goes into the new session."""
    known = {"a": b"1", "b": b"1", "c": b"1", "own": b"1"}
    held = {"a": b"2", "c": b"1", "d": b"3", "own": b"9"}
    assert carried_over(known, held, {"own"}) == ({"a": b"2", "d": b"3"}, ["b"])


# States


def test_clear_is_pending_until_the_end_is_confirmed() -> None:
    """The cookie is not taken away from a browser whose session may go on."""
    stored = record()
    work, contents = bound(stored), {"a": 1}
    work.clear(contents)
    assert (work.state, work.pending_end, contents) == ("anonymous", stored.handle, {})
    assert work.stored_handle == stored.handle
    assert work.cookie_header(COOKIE) is None
    work.pending_end = None
    assert work.cookie_header(COOKIE) == COOKIE.clear()


def test_lost_session_sets_no_cookie() -> None:
    """It could overwrite that of a newer login."""
    work = bound()
    work.rotated("new", "w4")
    work.lose()
    assert (work.state, work.record, work.cookie_header(COOKIE)) == ("lost", None, None)


@pytest.mark.parametrize("state", ["unread", "degraded"])
def test_session_that_was_not_read(state: str) -> None:
    """``unread``: no access. ``degraded``: it can be read as empty, and not be changed."""
    work = UnitOfWork({}, SessionConfig())
    error = StoreUnavailable("down", retry_after=7.0)
    work.not_read((Handle("00.x"), b"s"), error, degraded=state == "degraded")
    assert work.state == state
    check = work.check_readable if state == "unread" else work.check_writable
    with pytest.raises(StoreUnavailable) as raised:
        check()
    assert work.raised is raised.value
    if state == "unread":
        assert raised.value.retry_after == 7.0
        assert raised.value.__cause__ is error
    else:
        work.check_readable()


def test_phases_of_a_response() -> None:
    """With the headers the last moment for a cookie is gone; after the start a change is an error."""
    work = bound()
    work.check_cookie("login")
    work.cookie_header(COOKIE)
    with pytest.raises(RuntimeError, match="login needs a cookie"):
        work.check_cookie("login")
    work.check_writable()
    work.phase = "sealed"
    with pytest.raises(RuntimeError, match="after the response started"):
        work.check_writable()
    work.check_sealed({})
    with pytest.raises(RuntimeError, match="lost: 'late'"):
        work.check_sealed({"late": 1})


# Times and cookies


def test_idle_time_is_extended_after_a_tenth() -> None:
    """Not near the absolute timeout, where it gains nothing."""
    work = bound()
    assert not work.touch_due(9.9, accessed=False)
    assert work.touch_due(10.1, accessed=False)
    work.extended(10.0)
    assert (work.expires_at, work.touch_due(19.0, accessed=True)) == (110.0, False)
    assert not bound(record(absolute_in=100.0)).touch_due(99.0, accessed=True)


def test_rolling_cookie_is_renewed_by_a_request_that_uses_the_session() -> None:
    """Another one leaves the renewal to it for a tenth more."""
    work = bound(cookie=CookieConfig(max_age=7200, rolling=True))
    assert not work.renewal_due(10.1, accessed=True)
    work.secret = "secret"
    assert work.renewal_due(10.1, accessed=True)
    assert not work.renewal_due(10.1, accessed=False)
    assert (work.touch_due(10.1, accessed=True), work.touch_due(10.1, accessed=False)) == (True, False)


def test_created_session_sets_its_cookie() -> None:
    """With its own lifetime when it was made with one."""
    stored = record(user=UserId("ada"), persistent=True, idle=50.0)
    work = UnitOfWork({}, SessionConfig())
    work.created_as(stored, "secret", 0.0)
    assert (work.state, work.created, work.expires_at) == ("bound", True, 100.0)
    header = work.cookie_header(COOKIE)
    assert header is not None
    assert f"{stored.handle}.secret; Max-Age=50".encode() in header[1]


def test_rotated_session_is_the_same_session() -> None:
    """Another secret, one version more."""
    stored = record()
    work = bound(stored)
    work.rotated("new", "w4")
    expected = msgspec.structs.replace(stored, secret=secret_hash(b"new"), write_id="w4", version=4)
    assert (work.record, work.secret, work.cookie) == (expected, "new", "set")


# Deadlines


def test_deadline_counts_the_work_inside_only() -> None:
    """Work that fails is deducted too, and nothing begins when nothing is left."""
    clock = Clock()
    deadline = Deadline(1.0, clock)

    def work(*, fails: bool = False) -> float:
        with deadline.spending() as timeout:
            clock.now += 0.5
            if fails:
                raise KeyError
        return timeout

    assert work() == 1.0
    clock.now += 100
    assert deadline.left == 0.5
    with pytest.raises(KeyError):
        work(fails=True)
    with pytest.raises(StoreUnavailable, match="used up"), deadline.spending():
        raise AssertionError("nothing is left")


async def test_request_has_one_deadline_until_its_response_starts() -> None:
    """After that each call has one of its own; a call may also begin one."""
    clock = Clock()
    work, here = bound(), node(clock)
    first = work.deadline(here)
    assert work.deadline(here) is first
    work.next_deadline(here)
    assert work.deadline(here) is not first
    work.cookie_header(COOKIE)
    assert work.deadline(here) is not work.deadline(here)


async def test_last_error_is_noted_until_work_succeeds() -> None:
    """A 500 of the app's is not about an error that was made good."""
    work, here = bound(), node(Clock())
    down = StoreUnavailable("down")
    with pytest.raises(StoreUnavailable), work.spending(here):
        raise down
    assert work.raised is down
    with pytest.raises(KeyError), work.spending(here):
        raise KeyError
    assert work.raised is down
    with work.spending(here):
        pass
    assert work.raised is None
