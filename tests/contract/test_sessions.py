"""What every session store does."""

from __future__ import annotations

import asyncio
import time

import pytest

from asgi_cluster.ids import Handle, UserId, bucket_of, new_handle
from asgi_cluster.sessions.store import EndResult, NewSession
from tests.contract.drafts import alive, create, draft, end, end_all, last_logout, rotate, write
from tests.contract.sites import TIMEOUT, Site
from tests.support.waiting import eventually

pytestmark = pytest.mark.quick


async def test_read_of_what_was_created(site: Site) -> None:
    """A session comes back as it was stored, from another node too, with durations and not times."""
    a, b = await site.node(), await site.node()
    made = await create(a.backend.store, "ann", persistent=True, fields={"k\u00e9y.1": b"\x00\xff", "": b""})
    record = await b.backend.store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert (record.handle, record.secret, record.user) == (made.handle, made.secret, "ann")
    assert (record.write_id, record.version, record.persistent) == (made.write_id, 1, True)
    assert dict(record.fields) == {"k\u00e9y.1": b"\x00\xff", "": b""}
    assert (record.previous, record.previous_for) == (None, 0.0)
    assert record.expires_in == pytest.approx(100, abs=2)
    assert record.absolute_in == pytest.approx(1000, abs=2)
    assert record.idle == 100
    assert record.created_at == pytest.approx(time.time(), abs=5)


async def test_create_says_when_by_the_stores_clock(site: Site) -> None:
    """The moment that every later read gives, to the last digit."""
    store = (await site.node()).backend.store
    made = draft()
    created_at = await store.create(made, timeout=TIMEOUT)
    record = await store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert record.created_at == created_at


async def test_read_of_an_unknown_handle(site: Site) -> None:
    """Missing is None."""
    node = await site.node()
    assert await node.backend.store.read(new_handle(None), timeout=TIMEOUT) is None


async def test_create_of_a_session_with_thousands_of_fields(site: Site) -> None:
    """The number of fields has no limit of its own: create, write and remove ten thousand."""
    store = (await site.node()).backend.store
    fields = {f"field-{n}": b"\x01" for n in range(10_000)}
    made = await create(store, fields=fields)
    assert await write(store, made.handle, changed=dict.fromkeys(fields, b"\x02")) == "written"
    record = await store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert dict(record.fields) == dict.fromkeys(fields, b"\x02")
    assert await write(store, made.handle, changed={}, removed=[*fields][1:]) == "written"
    record = await store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert dict(record.fields) == {"field-0": b"\x02"}


async def test_create_over_an_existing_session(site: Site) -> None:
    """Nothing of the old one is left."""
    store = (await site.node()).backend.store
    made = await create(store)
    await store.create(draft(handle=made.handle, fields={"new": b"\x01"}), timeout=TIMEOUT)
    record = await store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert dict(record.fields) == {"new": b"\x01"}


async def test_write_merges_key_by_key(site: Site) -> None:
    """Two writers of different keys do not undo each other, and each write has a version and an id of its
    own.
    """
    a, b = await site.node(), await site.node()
    made = await create(a.backend.store)
    assert await write(a.backend.store, made.handle, changed={"a": b"1"}, write_id="w1") == "written"
    assert (
        await write(b.backend.store, made.handle, changed={"b": b"2"}, removed=["cart"], write_id="w2")
        == "written"
    )
    record = await a.backend.store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert dict(record.fields) == {"theme": b"\xa4dark", "a": b"1", "b": b"2"}
    assert (record.version, record.write_id) == (3, "w2")


async def test_write_of_a_key_that_is_removed_too(site: Site) -> None:
    """Removals come first, so that a key that is in both is there afterwards."""
    store = (await site.node()).backend.store
    made = await create(store)
    assert await write(store, made.handle, changed={"cart": b"new"}, removed=["cart"]) == "written"
    record = await store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert record.fields["cart"] == b"new"


async def test_write_of_what_is_there(site: Site) -> None:
    """Nothing is published, and version and write id stay: another writer gets no conflict."""
    node = await site.node()
    store = node.backend.store
    made = await create(store, fields={"cart": b"\x01", "theme": b"\x02"})
    same = {"cart": b"\x01"}
    assert await write(store, made.handle, changed=same, removed=["none"], message=b"no") == "unchanged"
    assert await write(store, made.handle, changed=same, removed=["cart"], message=b"no") == "unchanged"
    assert await write(store, made.handle, changed={}, removed=["none"], message=b"no") == "unchanged"
    record = await store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert (record.write_id, record.version, len(record.fields)) == (made.write_id, 1, 2)
    assert await write(store, made.handle, expected=made.write_id) == "written"
    await _heard(node.heard.sessions, [b"changed"])


async def test_write_that_leaves_nothing(site: Site) -> None:
    """An anonymous session ends with its last field, and its end is published; it stays when another field is
    there, when the caller wants it to, and when it has a user.
    """
    node = await site.node()
    store = node.backend.store

    async def empty(user: str | None, *removed: str, ended: bytes = b"emptied") -> tuple[str, bool]:
        made = await create(store, user)
        before = len(node.heard.sessions)
        outcome = await write(store, made.handle, changed={}, removed=removed, ended=ended)
        # Before the next session: on a Cluster that may be at another primary, without an order between them.
        await eventually(lambda: len(node.heard.sessions) > before)
        return outcome, await alive(store, made.handle)

    assert await empty(None, "cart") == ("written", True)
    assert await empty(None, "cart", "theme", "none") == ("ended", False)
    assert await empty("ann", "cart", "theme") == ("written", True)
    assert await empty(None, "cart", "theme", ended=b"") == ("written", True)
    await _heard(node.heard.sessions, [b"changed", b"emptied", b"changed", b"changed"])


async def test_write_that_leaves_nothing_and_was_overtaken(site: Site) -> None:
    """With the write id that was read it is a conflict; the session stays."""
    store = (await site.node()).backend.store
    made = await create(store, fields={"a": b"\x01"})
    await write(store, made.handle)
    gone = ["a", "cart"]
    assert await write(store, made.handle, changed={}, removed=gone, expected=made.write_id) == "conflict"
    assert await alive(store, made.handle)


async def test_end_that_was_overtaken(site: Site) -> None:
    """An end with the write id that was read: with another one nothing is ended or published, and the caller
    gets the present contents."""
    node = await site.node()
    store = node.backend.store
    made, gone = await create(store, "ann"), await create(store)
    await end(store, gone.handle)
    await write(store, made.handle, write_id="w1")
    values = {f"k{n}": b"\xc4\x00" for n in range(3000)}
    await write(store, made.handle, changed=values, removed=["theme"], write_id="w2")

    async def attempt(handle: Handle, expected: str) -> EndResult:
        return await store.end(handle, message=b"ended", expected=expected, timeout=TIMEOUT)

    overtaken = await attempt(made.handle, "w1")
    assert (overtaken.sessions, overtaken.overtaken) == (0, "w2")
    assert dict(overtaken.fields) == {"cart": b"\x02"} | values
    assert await alive(store, made.handle)
    ended = await attempt(made.handle, "w2")
    assert (ended.sessions, ended.overtaken) == (1, "")
    assert not await alive(store, made.handle)
    assert (await attempt(gone.handle, "w1")).overtaken == ""
    await eventually(lambda: node.heard.sessions.count(b"ended") == 3)


async def test_write_with_an_overtaken_write_id(site: Site) -> None:
    """Another request's write in between is a conflict; nothing is written and nothing is published."""
    node = await site.node()
    store = node.backend.store
    made = await create(store)
    assert await write(store, made.handle, write_id="w1", expected=made.write_id) == "written"
    assert (
        await write(store, made.handle, changed={"cart": b"lost"}, expected=made.write_id, message=b"no")
        == "conflict"
    )
    record = await store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert (record.fields["cart"], record.write_id, record.version) == (b"\x02", "w1", 2)
    await _heard(node.heard.sessions, [b"changed"])


async def _heard(heard: list[bytes], expected: list[bytes]) -> None:
    await eventually(lambda: len(heard) >= len(expected))
    assert heard == expected


async def test_write_to_an_ended_session(site: Site) -> None:
    """A request that was under way during a logout brings nothing back: no record, no message."""
    a, b = await site.node(), await site.node()
    made = await create(a.backend.store, "ann")
    await end(a.backend.store, made.handle)
    assert await write(b.backend.store, made.handle) == "gone"
    assert not await b.backend.store.touch(made.handle, timeout=TIMEOUT)
    assert await rotate(b.backend.store, made.handle, made.secret, b"n" * 32) == "gone"
    assert not await alive(a.backend.store, made.handle)
    # Of the same user, and so in the same bucket: on a Cluster others have no order with it.
    await write(b.backend.store, (await create(b.backend.store, "ann")).handle, message=b"sentinel")
    await _heard(a.heard.sessions, [b"ended", b"sentinel"])


async def test_changes_are_published_to_all_nodes(site: Site) -> None:
    """Write, rotate, end and log out everywhere are published to every node, in order; create, touch and
    reads are not.
    """
    a, b = await site.node(), await site.node()
    store = a.backend.store
    made = await create(store, "ann")
    await store.touch(made.handle, timeout=TIMEOUT)
    await write(store, made.handle)
    await rotate(store, made.handle, made.secret, b"n" * 32)
    await end(store, made.handle)
    await end_all(store, "ann")
    for node in (a, b):
        await _heard(node.heard.sessions, [b"changed", b"rotated", b"ended", b"all ended"])


async def test_end_of_a_session(site: Site) -> None:
    """It is gone, the receipt names the registered nodes, and a second end is still published to them."""
    a, b = await site.node(), await site.node()
    publisher = await site.node(listen=False)
    made = await create(publisher.backend.store, "ann")
    ending = await end(publisher.backend.store, made.handle)
    assert ending.sessions == 1
    assert sorted(ending.nodes) == sorted([a.id, b.id])
    assert not await alive(a.backend.store, made.handle)
    assert await a.backend.store.devices(UserId("ann"), timeout=TIMEOUT) == []
    again = await end(publisher.backend.store, made.handle)
    assert again.sessions == 0
    await _heard(b.heard.sessions, [b"ended", b"ended"])


async def test_end_after_a_node_has_left(site: Site) -> None:
    """A node that signed off need not acknowledge."""
    a, b = await site.node(), await site.node()
    made = await create(a.backend.store)
    await b.leave()
    assert list((await end(a.backend.store, made.handle)).nodes) == [a.id]


async def test_rotate_of_the_secret(site: Site) -> None:
    """The new secret holds, the old one through its grace, and a second rotation with the old one is a
    conflict.
    """
    store = (await site.node()).backend.store
    made = await create(store)
    assert await rotate(store, made.handle, made.secret, b"2" * 32, grace=50) == "written"
    record = await store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert (record.secret, record.previous, record.version) == (b"2" * 32, made.secret, 2)
    assert record.previous_for == pytest.approx(50, abs=2)
    assert await rotate(store, made.handle, made.secret, b"3" * 32) == "conflict"


async def test_rotate_with_a_grace_that_ends(site: Site) -> None:
    """After the grace the old secret is not handed out any more."""
    store = (await site.node()).backend.store
    made = await create(store)
    assert await rotate(store, made.handle, made.secret, b"2" * 32, grace=0.05) == "written"

    async def forgotten() -> bool:
        record = await store.read(made.handle, timeout=TIMEOUT)
        assert record is not None
        return record.previous is None and record.previous_for == 0.0

    await eventually(forgotten)


async def test_idle_timeout_and_what_extends_it(site: Site) -> None:
    """Writes and touches extend the idle time; rotating and reading do not."""
    store = (await site.node()).backend.store
    kept = [await create(store, idle=0.4) for _ in range(2)]
    lost = [await create(store, idle=0.4) for _ in range(2)]

    async def over() -> bool:
        # From the second time on it changes nothing, and extends the idle time all the same.
        assert await write(store, kept[0].handle) in ("written", "unchanged")
        assert await store.touch(kept[1].handle, timeout=TIMEOUT)
        rotated = await rotate(store, lost[1].handle, lost[1].secret, lost[1].secret)
        return rotated == "gone" and not await alive(store, lost[0].handle)

    await eventually(over)
    # The others have been kept alive for longer than their idle timeout by now.
    assert [await alive(store, made.handle) for made in kept] == [True, True]


async def test_absolute_timeout(site: Site) -> None:
    """However busy it is, a session ends at its absolute timeout, and a read never promises more."""
    store = (await site.node()).backend.store
    made = await create(store, "ann", idle=100.0, absolute=0.3)

    async def over() -> bool:
        await write(store, made.handle)
        await store.touch(made.handle, timeout=TIMEOUT)
        record = await store.read(made.handle, timeout=TIMEOUT)
        assert record is None or record.expires_in <= 0.3
        return record is None

    await eventually(over)
    assert await store.devices(UserId("ann"), timeout=TIMEOUT) == []


async def test_timeouts_beyond_reason(site: Site) -> None:
    """A timeout of ten thousand years is no error of the server's."""
    store = (await site.node()).backend.store
    made = await create(store, "ann", idle=3e11, absolute=3e11)
    assert await write(store, made.handle) == "written"
    assert await alive(store, made.handle)


async def test_devices_of_a_user(site: Site) -> None:
    """A user's living sessions, the last seen first, with where they were made; no other user's."""
    store = (await site.node()).backend.store
    first = await create(store, "ann", agent="Phone \u00e9", address="2001:db8::1")
    second = await create(store, "ann")
    await create(store, "bob")
    await create(store)

    async def seen_first() -> bool:
        await store.touch(first.handle, timeout=TIMEOUT)
        devices = await store.devices(UserId("ann"), timeout=TIMEOUT)
        return [device.handle for device in devices] == [first.handle, second.handle] and (
            devices[0].seen_at > devices[1].seen_at
        )

    await eventually(seen_first)
    device = (await store.devices(UserId("ann"), timeout=TIMEOUT))[0]
    assert (device.agent, device.address) == ("Phone \u00e9", "2001:db8::1")
    assert device.created_at == pytest.approx(time.time(), abs=10)
    assert device.expires_in == pytest.approx(100, abs=5)


async def test_end_all_sessions_of_a_user(site: Site) -> None:
    """All of one user's are gone at once, no other user's, and the user can sign in again."""
    store = (await site.node()).backend.store
    mine = [await create(store, "ann") for _ in range(3)]
    others = [await create(store, "bob"), await create(store)]
    assert (await end_all(store, "ann")).sessions == 3
    assert [await alive(store, made.handle) for made in mine] == [False] * 3
    assert [await write(store, made.handle) for made in mine] == ["gone"] * 3
    assert [await alive(store, made.handle) for made in others] == [True] * 2
    again = await create(store, "ann")
    assert await alive(store, again.handle)
    assert [device.handle for device in await store.devices(UserId("ann"), timeout=TIMEOUT)] == [again.handle]
    assert (await end_all(store, "nobody")).sessions == 0


async def test_end_all_but_one(site: Site) -> None:
    """The kept session goes on as before: it can be read, written, listed, and ended with the next log out
    everywhere.
    """
    store = (await site.node()).backend.store
    mine = [await create(store, "ann") for _ in range(3)]
    kept = mine[1].handle
    assert (await end_all(store, "ann", keep=kept)).sessions == 2
    assert [await alive(store, made.handle) for made in mine] == [False, True, False]
    assert await write(store, kept) == "written"
    assert await store.touch(kept, timeout=TIMEOUT)
    assert [device.handle for device in await store.devices(UserId("ann"), timeout=TIMEOUT)] == [kept]
    later = await create(store, "ann")
    assert (await end_all(store, "ann")).sessions == 2
    assert not await alive(store, kept)
    assert not await alive(store, later.handle)


@pytest.mark.parametrize("whose", ["another user's", "nobody's", "one that is over"])
async def test_end_all_but_a_session_that_is_not_the_users(site: Site, whose: str) -> None:
    """Keeping what does not belong to the user keeps nothing, and does no harm."""
    store = (await site.node()).backend.store
    other = next(name for n in range(10_000) if bucket_of(name := f"u{n}") == bucket_of("ann"))
    if whose == "another user's":
        keep = await create(store, other)
    elif whose == "nobody's":
        keep = await create(store, handle=Handle(f"{bucket_of('ann'):02x}.x"))
    else:
        keep = await create(store, "ann")
        await end(store, keep.handle)
    mine = await create(store, "ann")
    assert (await end_all(store, "ann", keep=keep.handle)).sessions == 1
    assert not await alive(store, mine.handle)
    assert await alive(store, keep.handle) == (whose != "one that is over")


async def test_last_logout_of_a_user(site: Site) -> None:
    """Found by its name and its age, for several users at once, on another node too; a login is none, and
    leaves the last one where it is.
    """
    a, b = [(await site.node()).backend.store for _ in range(2)]
    users = [UserId(name) for name in ("ann", "bob", "eve", *(f"user-{n}" for n in range(20)))]
    await create(a, "ann")
    await create(a, "eve")
    assert dict(await b.logouts(users, timeout=TIMEOUT)) == {}
    began = time.monotonic()
    await end_all(a, "ann", epoch="first")
    await end_all(a, "bob", epoch="second")
    await create(a, "ann")
    found = await b.logouts(users, timeout=TIMEOUT)
    assert {user: logout.id for user, logout in found.items()} == {"ann": "first", "bob": "second"}
    for logout in found.values():
        # The clocks are two, and the store's may have milliseconds.
        assert -0.01 <= logout.ago <= time.monotonic() - began + 0.01
        assert (logout.keep, logout.before) == (None, None)
    ago = found[UserId("bob")].ago

    async def grows() -> bool:
        last = await last_logout(b, "bob")
        return last is not None and last.ago > ago

    await eventually(grows)
    await end_all(b, "ann", epoch="third")
    assert (last := await last_logout(a, "ann")) is not None
    assert last.id == "third"
    assert last.ago < (await a.logouts(users, timeout=TIMEOUT))[UserId("bob")].ago


async def test_last_logout_and_the_session_that_it_kept(site: Site) -> None:
    """One of the user's own needs no mention. Of another's, or nobody's, it says when the last logout was
    that did not keep it.
    """
    store = (await site.node()).backend.store
    own, guest, other = await create(store, "ann"), await create(store), await create(store, "bob")

    async def logout(keep: Handle) -> tuple[Handle | None, bool, bool]:
        await end_all(store, "ann", keep=keep)
        last = await last_logout(store, "ann")
        assert last is not None
        return last.keep, last.before is not None, last.before is not None and last.before > last.ago

    async def a_moment() -> None:
        last = await last_logout(store, "ann")
        assert last is not None

        async def older() -> bool:
            now = await last_logout(store, "ann")
            return now is not None and now.ago > last.ago

        await eventually(older)

    assert await logout(guest.handle) == (guest.handle, False, False)
    assert await logout(guest.handle) == (guest.handle, False, False)
    await a_moment()
    assert await logout(other.handle) == (other.handle, True, True)
    assert await logout(other.handle) == (other.handle, True, True)
    own = await create(store, "ann")
    assert await logout(own.handle) == (None, False, False)
    assert await alive(store, own.handle)
    assert await write(store, own.handle) == "written"
    await a_moment()
    assert await logout(guest.handle) == (guest.handle, True, True)
    assert not await alive(store, own.handle)


async def test_lock_of_a_session(site: Site) -> None:
    """One holder at a time; only the holder can give it back; it goes by itself when its time is over."""
    a, b = await site.node(), await site.node()
    handle = (await create(a.backend.store)).handle
    assert await a.backend.store.lock(handle, token="a", hold=50, timeout=TIMEOUT)
    assert not await b.backend.store.lock(handle, token="b", hold=50, timeout=TIMEOUT)
    assert not await b.backend.store.unlock(handle, token="b", timeout=TIMEOUT)
    assert await a.backend.store.unlock(handle, token="a", timeout=TIMEOUT)
    assert not await a.backend.store.unlock(handle, token="a", timeout=TIMEOUT)
    assert await b.backend.store.lock(handle, token="b", hold=0.05, timeout=TIMEOUT)
    await eventually(lambda: a.backend.store.lock(handle, token="a", hold=50, timeout=TIMEOUT))
    assert not await b.backend.store.unlock(handle, token="b", timeout=TIMEOUT)


async def test_writes_at_once_from_two_nodes(site: Site) -> None:
    """Fifty writers of fifty keys on two nodes: every key is there, and every write was counted."""
    a, b = await site.node(), await site.node()
    made = await create(a.backend.store, fields={})
    outcomes = await asyncio.gather(
        *(write((a, b)[n % 2].backend.store, made.handle, changed={f"k{n}": b"%d" % n}) for n in range(50))
    )
    assert set(outcomes) == {"written"}
    record = await a.backend.store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert dict(record.fields) == {f"k{n}": b"%d" % n for n in range(50)}
    assert record.version == 51


async def test_writes_at_once_that_expect_the_same(site: Site) -> None:
    """Of writers that compare the write id exactly one wins."""
    a, b = await site.node(), await site.node()
    made: NewSession = await create(a.backend.store)
    outcomes = await asyncio.gather(
        *(
            write(
                (a, b)[n % 2].backend.store,
                made.handle,
                changed={"winner": b"%d" % n},
                expected=made.write_id,
            )
            for n in range(20)
        )
    )
    assert sorted(outcomes) == ["conflict"] * 19 + ["written"]
