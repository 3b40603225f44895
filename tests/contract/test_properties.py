"""Random sequences of operations: memory and Redis answer the same, and both are what a plain model says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi_cluster.ids import Handle, UserId, bucket_of, new_token
from asgi_cluster.rooms.history import Entry, Page, Position, open_envelope
from asgi_cluster.sessions.store import NewSession
from tests.contract.drafts import end, end_all, write
from tests.contract.sites import TIMEOUT, Member, Site

USERS = [None, "ann", "bob"]
FIELDS = ["a", "@secret", ""]
SLOTS = range(3)

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(scope="module")
def both(url_of: Callable[[str], str]) -> Any:
    """One loop with one node of each kind, for all examples of this module."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def start() -> tuple[Member, Member]:
            prefix = f"t{new_token()}"
            memory = await Site("memory", f"memory://{prefix}", prefix, stack).node()
            server = await Site("valkey", url_of("valkey"), prefix, stack).node()
            return memory, server

        members = runner.run(start())
        yield members, runner.run
        runner.run(stack.aclose())


def handle_of(run: str, slot: int, user: str | None) -> Handle:
    bucket = 7 if user is None else bucket_of(user)
    return Handle(f"{bucket:02x}.{run}-{slot}")


names = st.sampled_from(FIELDS)
values = st.binary(max_size=3)
slots = st.sampled_from(SLOTS)
operations = st.one_of(
    st.tuples(st.just("create"), slots, st.sampled_from(USERS), st.dictionaries(names, values, max_size=3)),
    st.tuples(
        st.just("write"), slots, st.dictionaries(names, values, max_size=2), st.lists(names, max_size=2)
    ),
    st.tuples(st.just("compare"), slots, st.booleans()),
    st.tuples(st.just("rotate"), slots, st.booleans()),
    st.tuples(st.just("touch"), slots),
    st.tuples(st.just("end"), slots),
    st.tuples(st.just("end_all"), st.sampled_from(USERS[1:]), st.one_of(st.none(), slots)),
    st.tuples(st.just("lock"), slots, st.sampled_from("xy")),
    st.tuples(st.just("unlock"), slots, st.sampled_from("xy")),
)


class Pair:
    """One example: the same operations on both stores, and what should come of them."""

    def __init__(self, members: tuple[Member, Member]) -> None:
        self.stores = [member.backend.store for member in members]
        self.run = new_token()
        self.user: dict[int, str | None] = {}
        self.model: dict[Handle, dict[str, bytes]] = {}
        self.whose: dict[Handle, str | None] = {}
        self.secret: dict[Handle, bytes] = {}
        self.write_id: dict[Handle, str] = {}
        self.count = 0

    def name(self, user: str) -> str:
        return f"{user}-{self.run}"

    def handle(self, slot: int) -> Handle:
        user = self.user.get(slot)
        return handle_of(self.run, slot, None if user is None else self.name(user))

    async def each(self, call: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        first, second = [await call(store) for store in self.stores]
        assert first == second
        return first

    async def create(self, slot: int, user: str | None, fields: dict[str, bytes]) -> None:
        if self.handle(slot) in self.model:
            return
        self.user[slot] = user
        handle, self.count = self.handle(slot), self.count + 1
        draft = NewSession(
            handle=handle,
            secret=b"%d" % self.count,
            user=None if user is None else UserId(self.name(user)),
            fields=fields,
            write_id=f"w{self.count}",
            idle=100,
            absolute=1000,
            epoch=new_token(),
        )
        for store in self.stores:  # each says when, by a clock of its own
            await store.create(draft, timeout=TIMEOUT)
        self.model[handle], self.whose[handle] = dict(fields), user
        self.secret[handle], self.write_id[handle] = draft.secret, draft.write_id

    async def write(self, slot: int, changed: dict[str, bytes], removed: list[str]) -> None:
        handle, self.count = self.handle(slot), self.count + 1
        name = f"w{self.count}"
        outcome = await self.each(
            lambda store: write(store, handle, changed=changed, removed=removed, write_id=name)
        )
        if handle not in self.model:
            assert outcome == "gone"
            return
        before = self.model[handle]
        fields = {key: value for key, value in before.items() if key not in removed} | changed
        if fields == before:
            assert outcome == "unchanged"
        elif not fields and self.whose[handle] is None:
            assert outcome == "ended"
            del self.model[handle]
        else:
            assert outcome == "written"
            self.model[handle], self.write_id[handle] = fields, name

    async def compare(self, slot: int, current: bool) -> None:
        handle, self.count = self.handle(slot), self.count + 1
        name = f"w{self.count}"
        expected = self.write_id.get(handle, "none") if current else "another"
        outcome = await self.each(
            lambda store: write(store, handle, changed={"a": b"c"}, write_id=name, expected=expected)
        )
        new = self.model.get(handle, {}).get("a") != b"c"
        passes = "written" if new else "unchanged"
        assert outcome == ("gone" if handle not in self.model else passes if current else "conflict")
        if outcome == "written":
            self.model[handle]["a"] = b"c"
            self.write_id[handle] = name

    async def rotate(self, slot: int, current: bool) -> None:
        handle, self.count = self.handle(slot), self.count + 1
        name, secret = f"w{self.count}", b"%d" % self.count
        old = self.secret.get(handle, b"none") if current else b"another"
        outcome = await self.each(
            lambda store: store.rotate(
                handle, secret=secret, current=old, grace=50, write_id=name, message=b"r", timeout=TIMEOUT
            )
        )
        assert outcome == ("gone" if handle not in self.model else "written" if current else "conflict")
        if outcome == "written":
            self.secret[handle], self.write_id[handle] = secret, name

    async def touch(self, slot: int) -> None:
        handle = self.handle(slot)
        assert await self.each(lambda store: store.touch(handle, timeout=TIMEOUT)) == (handle in self.model)

    async def end(self, slot: int) -> None:
        handle = self.handle(slot)
        ended = await self.each(lambda store: _sessions(end(store, handle)))
        assert ended == (handle in self.model)
        self.model.pop(handle, None)

    async def end_all(self, user: str, slot: int | None) -> None:
        keep = None if slot is None else self.handle(slot)
        ended = await self.each(lambda store: _sessions(end_all(store, self.name(user), keep=keep)))
        over = [handle for handle in self.model if self.whose[handle] == user and handle != keep]
        assert ended == len(over)
        for handle in over:
            del self.model[handle]

    async def lock(self, slot: int, token: str) -> None:
        handle = self.handle(slot)
        await self.each(lambda store: store.lock(handle, token=token, hold=100, timeout=TIMEOUT))

    async def unlock(self, slot: int, token: str) -> None:
        handle = self.handle(slot)
        await self.each(lambda store: store.unlock(handle, token=token, timeout=TIMEOUT))

    async def check(self) -> None:
        for slot in SLOTS:
            handle = self.handle(slot)
            records = [await store.read(handle, timeout=TIMEOUT) for store in self.stores]
            for record in records:
                assert (record is not None) == (handle in self.model)
                if record is not None:
                    assert dict(record.fields) == self.model[handle]
                    assert (record.secret, record.write_id) == (self.secret[handle], self.write_id[handle])
            first, second = records
            if first is not None and second is not None:
                assert (first.version, first.previous, first.user) == (
                    second.version,
                    second.previous,
                    second.user,
                )
        for user in USERS[1:]:
            listed = [
                {d.handle for d in await store.devices(UserId(self.name(user or "")), timeout=TIMEOUT)}
                for store in self.stores
            ]
            assert listed == [{handle for handle in self.model if self.whose[handle] == user}] * 2


async def _sessions(ending: Coroutine[Any, Any, Any]) -> int:
    return int((await ending).sessions)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(operations, min_size=1, max_size=25))
def test_session_stores_agree(both: tuple[tuple[Member, Member], Run], steps: list[tuple[Any, ...]]) -> None:
    """Whatever is done in whatever order, both stores give the same answers and hold what the model holds."""
    members, run = both

    async def example() -> None:
        pair = Pair(members)
        # Something to work on from the start: short sequences are what is mostly tried.
        for slot, user in zip(SLOTS, USERS, strict=True):
            await pair.create(slot, user, dict.fromkeys(FIELDS, b"0"))
        for name, *args in steps:
            await getattr(pair, name)(*args)
            await pair.check()

    run(example())


publications = st.one_of(
    st.tuples(st.just("publish"), st.integers(1, 5), st.sampled_from([None, None, "k1", "k2"])),
    st.tuples(
        st.just("read"), st.integers(0, 12), st.sampled_from([None, 0, 1, 3]), st.booleans(), st.booleans()
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(publications, min_size=1, max_size=30))
def test_histories_agree(both: tuple[tuple[Member, Member], Run], steps: list[tuple[Any, ...]]) -> None:
    """Publications and reads of every kind: the same positions, entries and completeness, and what was
    received is what is read.
    """
    members, run = both
    run(_histories(members, steps))


async def _histories(members: tuple[Member, Member], steps: list[tuple[Any, ...]]) -> None:
    room, epoch = f"room {new_token()}", new_token()
    log: list[bytes] = []
    held = 0
    keys: dict[str, Position] = {}
    memory = members[0]
    await memory.backend.room_bus.subscribe(room)
    starts = [0, 0]  # each numbering begins with a random offset; here they count from 1

    def count(offset: int, start: int) -> int:
        return offset - start if offset else 0

    def counted(page: Page, start: int) -> Page:
        entries = [Entry(count(e.offset, start), count(e.previous, start), e.payload) for e in page.entries]
        return Page(entries, Position(count(page.top.offset, start), page.top.epoch), page.complete)

    for step in steps:
        if step[0] == "publish":
            _, size, key = step
            payload = b"%d" % len(log)
            positions = [
                await member.backend.history.publish(
                    room, payload, size=size, ttl=100, idempotency_key=key, epoch=epoch, timeout=TIMEOUT
                )
                for member in members
            ]
            if not log:
                starts = [position.offset - 1 for position in positions]
            positions = [
                Position(count(position.offset, start), position.epoch)
                for position, start in zip(positions, starts, strict=True)
            ]
            assert positions[0] == positions[1]
            if key in keys:
                assert positions[0] == keys[key]
                continue
            log.append(payload)
            held = min(held + 1, size)
            assert positions[0] == Position(len(log), epoch)
            if key is not None:
                keys[key] = positions[0]
        else:
            _, offset, limit, reverse, everything = step
            since = None if everything else offset
            pages = []
            for member, start in zip(members, starts, strict=True):
                place = None if everything else Position(start + offset if offset else 0, epoch)
                page = await member.backend.history.read(
                    room, since=place, limit=limit, reverse=reverse, epoch=epoch, ttl=100, timeout=TIMEOUT
                )
                pages.append(counted(page, start))
            assert pages[0] == pages[1]
            numbers = list(range(len(log) - held + 1, len(log) + 1))
            if since is not None:
                numbers = [n for n in numbers if (n < offset if reverse else n > offset)]
                assert pages[0].complete == (len(log) - held <= offset <= len(log))
            numbers = numbers[::-1] if reverse else numbers
            assert [entry.offset for entry in pages[0].entries] == numbers[:limit]
            assert [entry.payload for entry in pages[0].entries] == [log[n - 1] for n in numbers[:limit]]
    heard = [open_envelope(envelope) for name, envelope in memory.heard.rooms if name == room]
    start = starts[0]
    assert heard == [
        (Position(start + n + 1, epoch), start + n if n else 0, payload) for n, payload in enumerate(log)
    ]
