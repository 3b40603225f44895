"""What is special about ``memory://``: names, lifetimes, threads, and a clock that tests can turn."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import tracemalloc

import pytest

from asgi_cluster.backends.memory.backend import MemoryBackend
from asgi_cluster.backends.memory.expiring import Expiring
from asgi_cluster.ids import UserId
from asgi_cluster.rooms.history import seal_envelope
from tests.contract.drafts import alive, create, end, write
from tests.contract.sites import TIMEOUT, Recorder, make_node


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def attached(name: str | None, receiver: Recorder | None = None) -> tuple[MemoryBackend, Recorder]:
    backend, heard = MemoryBackend(name, lease_duration=1.0), Recorder()
    backend.attach(make_node(), receiver or heard, receiver or heard)
    return backend, heard


async def test_name_decides_who_meets(prefix: str) -> None:
    """The same name is one cluster; another name, or none, is another."""
    a, heard_a = attached(prefix)
    b, heard_b = attached(prefix)
    other, _ = attached(prefix + "x")
    alone, _ = attached(None)
    also_alone, _ = attached(None)
    made = await create(a.store, "ann")
    stores = (b.store, other.store, alone.store, also_alone.store)
    assert [await alive(store, made.handle) for store in stores] == [True, False, False, False]
    await write(b.store, made.handle)
    assert heard_a.sessions == heard_b.sessions == [b"changed"]


async def test_name_that_nobody_uses_any_more(prefix: str) -> None:
    """Its sessions go with the last backend of that name."""
    backend, _ = attached(prefix)
    made = await create(backend.store)
    del backend
    gc.collect()
    again, _ = attached(prefix)
    assert not await alive(again.store, made.handle)


async def test_attached_node_that_was_dropped(prefix: str) -> None:
    """A cluster object that was not stopped and has no reference takes no part, and its members are gone."""
    a, _ = attached(prefix)
    dropped, heard = attached(prefix)
    await dropped.presence.enter("r", "c", b"{}", timeout=TIMEOUT)
    assert len((await end(a.store, (await create(a.store)).handle)).nodes) == 2
    del dropped, heard
    gc.collect()
    assert len((await end(a.store, (await create(a.store)).handle)).nodes) == 1
    assert await a.presence.members("r", timeout=TIMEOUT) == {}


async def test_attaching_again(prefix: str) -> None:
    """The same node attached at every request is one node; a new id replaces the old one and keeps the
    rooms.
    """
    backend, heard = MemoryBackend(prefix, lease_duration=1.0), Recorder()
    node = make_node()
    for _ in range(3):
        backend.attach(node, heard, heard)
    incarnation = (await backend.session_bus.nodes(timeout=TIMEOUT))[node.id].incarnation
    backend.attach(node, heard, heard)
    assert (await backend.session_bus.nodes(timeout=TIMEOUT))[node.id].incarnation == incarnation
    await backend.room_bus.subscribe("r")
    node.renew()
    backend.attach(node, heard, heard)
    assert set(await backend.session_bus.nodes(timeout=TIMEOUT)) == {node.id}
    await backend.room_bus.publish("r", seal_envelope(None, 0, b"x"), timeout=TIMEOUT)
    assert len(heard.rooms) == 1


async def test_message_sent_while_another_is_received(prefix: str) -> None:
    """Answers come after the message that they answer, on every node: there is one order."""
    order: list[tuple[str, bytes]] = []

    class Answering(Recorder):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def session_message(self, payload: bytes) -> None:
            order.append((self.name, payload))
            if payload == b"ended":
                first.session_bus.post(nodes[0].id, b"ack by " + self.name.encode())

    receivers = [Answering("first"), Answering("second")]
    first, second = (MemoryBackend(prefix, lease_duration=1.0) for _ in receivers)
    nodes = [make_node(), make_node()]
    for backend, node, receiver in zip((first, second), nodes, receivers, strict=True):
        backend.attach(node, receiver, receiver)
    await end(second.store, (await create(second.store)).handle)
    assert order == [
        ("first", b"ended"),
        ("second", b"ended"),
        ("first", b"ack by first"),
        ("first", b"ack by second"),
    ]


async def test_receiver_that_fails(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    """A fault of one node is logged there, and costs neither the write nor the other nodes their message."""

    class Failing(Recorder):
        def session_message(self, payload: bytes) -> None:
            raise RuntimeError("broken receiver")

    failing = Failing()
    broken, _ = attached(prefix, failing)
    sound, heard = attached(prefix)
    made = await create(sound.store)
    with caplog.at_level(logging.ERROR, "asgi_cluster.memory"):
        assert await write(sound.store, made.handle, changed={"a": b"1"}) == "written"
    assert heard.sessions == [b"changed"]
    assert "broken receiver" in caplog.text
    record = await broken.store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert record.fields["a"] == b"1"


def test_store_from_many_threads_and_loops(prefix: str) -> None:
    """Eight threads with a loop each write one session: nothing is lost, and each node receives all."""
    backend, heard = attached(prefix)
    made = asyncio.run(create(backend.store, fields={}))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        async def writes() -> None:
            mine, _ = attached(prefix)
            for n in range(100):
                await write(mine.store, made.handle, changed={f"{number}.{n}": b"1"})

        try:
            asyncio.run(writes())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    record = asyncio.run(backend.store.read(made.handle, timeout=TIMEOUT))
    assert record is not None
    assert (len(record.fields), record.version) == (800, 801)
    assert len(heard.sessions) == 800


async def test_time_by_an_injected_clock() -> None:
    """Idle and absolute timeout, the grace of a rotation and locks, to the second."""
    clock = Clock()
    backend = MemoryBackend(None, lease_duration=1.0, clock=clock)
    made = await create(backend.store, "ann", idle=10, absolute=25)
    for now in (1009.0, 1018.0):
        clock.now = now
        assert await backend.store.touch(made.handle, timeout=TIMEOUT)
    record = await backend.store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert (record.expires_in, record.absolute_in) == (7.0, 7.0)
    assert await backend.store.lock(made.handle, token="t", hold=5, timeout=TIMEOUT)
    clock.now = 1022.9
    assert not await backend.store.lock(made.handle, token="u", hold=5, timeout=TIMEOUT)
    clock.now = 1023.0
    assert await backend.store.lock(made.handle, token="u", hold=5, timeout=TIMEOUT)
    clock.now = 1024.9
    assert await alive(backend.store, made.handle)
    clock.now = 1025.0
    assert not await alive(backend.store, made.handle)
    assert await backend.store.devices(UserId("ann"), timeout=TIMEOUT) == []


async def test_memory_after_thousands_of_visits() -> None:
    """What has expired or was ended is not kept: sessions, indexes, locks, histories, numberings, idempotency
    results.
    """
    clock = Clock()
    backend = MemoryBackend(None, lease_duration=1.0, clock=clock)
    backend.attach(make_node(), receiver := Recorder(), receiver)

    async def visits(count: int) -> None:
        for n in range(count):
            clock.now += 30.0
            made = await create(backend.store, f"user-{clock.now}", idle=50)
            await backend.store.lock(made.handle, token="t", hold=20, timeout=TIMEOUT)
            if n % 2:
                await end(backend.store, made.handle)
            await backend.history.publish(
                f"room-{clock.now}",
                b"x" * 50,
                size=10,
                ttl=60,
                idempotency_key=made.handle,
                epoch="e",
                timeout=TIMEOUT,
            )
            receiver.sessions.clear()

    tracemalloc.start()
    try:
        await visits(4_000)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        await visits(4_000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 500_000


def test_expiring_map() -> None:
    """Nothing expired is returned, extensions hold, what expired is reported once, and removed entries leave
    nothing behind.
    """
    clock, told = Clock(), []
    entries: Expiring[str, int] = Expiring(clock, on_expired=lambda key, value: told.append((key, value)))
    entries.set("a", 1, 1010)
    entries.set("b", 2, 1010)
    entries.set("a", 1, 1020)
    clock.now = 1010
    assert (entries.get("a"), entries.get("b")) == (1, None)
    assert told == [("b", 2)]
    clock.now = 1020
    entries.set("c", 3, 1030)
    assert told == [("b", 2), ("a", 1)]
    assert entries.pop("c") == 3
    assert entries.pop("c") is None
    for n in range(10_000):
        entries.set(f"k{n}", n, 99_999)
        entries.pop(f"k{n}")
    assert len(entries) == 0
    assert len(entries._due) <= 100
    # Set again before its time was over: it must not live or die by the old one.
    entries.set("d", 4, 1025)
    entries.pop("d")
    entries.set("d", 5, 1040)
    clock.now = 1026
    entries.set("e", 6, 1040)
    assert entries.get("d") == 5
    entries.set("d", 7, 1027)
    clock.now = 1041
    entries.sweep()
    assert len(entries) == 0
    assert sorted(told[2:]) == [("d", 7), ("e", 6)]
