"""Clients that recover: they speak the Centrifuge protocol, run in a process of their own, and check every
sequence.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from loadtest.processes import HOST


@dataclass
class Subscription:
    """What one client has received in one room."""

    room: str
    epoch: str = ""
    offset: int = 0
    numbers: list[int] = field(default_factory=list)
    reported: int = 0
    """How often the server reported that it could not recover."""


@dataclass
class Outcome:
    """The result of all clients."""

    received: int
    lost: int
    """Numbers missing in a sequence whose loss was not reported to the client."""
    doubled: int
    disordered: int
    reported: int
    reconnects: int
    recovery_times: list[float]
    """Seconds from the lost connection until all rooms were recovered."""
    last: dict[str, int]


@dataclass
class _Listener:
    ports: Sequence[int]
    subscriptions: dict[str, Subscription]
    reconnects: int = 0
    waits: set[str] = field(default_factory=set)
    lost_at: float | None = None
    times: list[float] = field(default_factory=list)

    async def run(self) -> None:
        port = self.ports[0]
        while True:
            try:
                async with connect(
                    f"ws://{HOST}:{port}/realtime/websocket",
                    compression=None,
                    ping_interval=None,
                    max_queue=None,
                ) as socket:
                    await self._session(socket)
            except (OSError, WebSocketException, InvalidHandshake, EOFError):
                pass
            self.lost_at = self.lost_at or time.monotonic()
            self.reconnects += 1
            await asyncio.sleep(random.uniform(0.02, 0.3))
            port = random.choice(self.ports)

    async def _session(self, socket: Any) -> None:
        await socket.send('{"id":1,"connect":{}}')
        lines = [json.dumps({"id": 2 + n, "subscribe": self._request(s)}) for n, s in self._numbered()]
        self.waits = set(self.subscriptions)
        await socket.send("\n".join(lines))
        names = {2 + number: subscription for number, subscription in self._numbered()}
        async for frame in socket:
            for line in str(frame).splitlines():
                if line == "{}":
                    await socket.send("{}")
                    continue
                message = json.loads(line)
                if "subscribe" in message:
                    self._subscribed(names[message["id"]], message["subscribe"])
                elif "error" in message:
                    return
                elif "pub" in (push := message.get("push", {})):
                    self._take(self.subscriptions[push["channel"]], push["pub"])
                elif "unsubscribe" in push:
                    return  # the simplest answer: connect again

    def _numbered(self) -> list[tuple[int, Subscription]]:
        return list(enumerate(self.subscriptions.values()))

    @staticmethod
    def _request(subscription: Subscription) -> dict[str, Any]:
        request: dict[str, Any] = {"channel": subscription.room}
        if subscription.epoch:
            request |= {"recover": True, "epoch": subscription.epoch, "offset": subscription.offset}
        return request

    def _subscribed(self, subscription: Subscription, reply: dict[str, Any]) -> None:
        if subscription.epoch and not reply.get("recovered"):
            subscription.reported += 1
            subscription.numbers.append(-1)  # after a reported loss any number may follow
        subscription.epoch = reply.get("epoch", "")
        for publication in reply.get("publications", []):
            self._take(subscription, publication)
        subscription.offset = max(
            reply.get("offset", 0), subscription.offset if reply.get("recovered") else 0
        )
        self.waits.discard(subscription.room)
        if not self.waits and self.lost_at is not None:
            self.times.append(time.monotonic() - self.lost_at)
            self.lost_at = None

    @staticmethod
    def _take(subscription: Subscription, publication: dict[str, Any]) -> None:
        subscription.numbers.append(publication["data"]["n"])
        subscription.offset = publication.get("offset", subscription.offset)


class Listeners:
    """The running process, as the load test uses it."""

    def __init__(self, counters: Any, pipe: Connection, expected: int) -> None:
        self._counters = counters
        self._pipe = pipe
        self._expected = expected

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until every client is in all its rooms.

        Raises:
            RuntimeError: ``timeout`` seconds are over.
        """
        deadline = time.monotonic() + timeout
        while self._counters[0] < self._expected:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._counters[0]} of {self._expected} clients are ready")
            time.sleep(0.01)

    def finish(self, last: dict[str, int], patience: float = 15.0) -> Outcome:
        """Wait until every client has the last number of each of its rooms, or ``patience`` seconds are over;
        returns what the clients received.
        """
        self._pipe.send((last, patience))
        if not self._pipe.poll(patience + 30):
            raise RuntimeError("the clients did not send their results")
        outcome: Outcome = self._pipe.recv()
        return outcome


@contextmanager
def listeners(ports: Sequence[int], rooms: Sequence[str], clients: int, each: int) -> Iterator[Listeners]:
    """``clients`` clients, each in ``each`` of the rooms, spread over ``ports``."""
    context = multiprocessing.get_context("spawn")
    counters = context.RawArray("q", 1)
    ours, theirs = context.Pipe()
    arguments = (list(ports), list(rooms), clients, each, counters, theirs)
    process = context.Process(target=_main, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        yield Listeners(counters, ours, clients)
    finally:
        ours.close()
        process.kill()
        process.join()
        process.close()


def _main(*arguments: Any) -> None:
    import uvloop

    uvloop.run(_run(*arguments))


async def _run(
    ports: list[int], rooms: list[str], clients: int, each: int, counters: Any, pipe: Connection
) -> None:
    people = []
    for number in range(clients):
        mine = [rooms[(number * each + step) % len(rooms)] for step in range(each)]
        turned = ports[number % len(ports) :] + ports[: number % len(ports)]
        people.append(_Listener(turned, {room: Subscription(room) for room in mine}))
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(person.run()) for person in people]
        counting = tasks.create_task(_count_ready(people, counters))
        last, patience = await asyncio.to_thread(pipe.recv)
        counting.cancel()
        deadline = time.monotonic() + patience
        while not all(_has(person, last) for person in people):
            await asyncio.sleep(0.05)
            if time.monotonic() > deadline:
                break
        for task in running:
            task.cancel()
    pipe.send(_judge(people, last))


async def _count_ready(people: Sequence[_Listener], counters: Any) -> None:
    while True:
        counters[0] = sum(all(s.epoch for s in person.subscriptions.values()) for person in people)
        await asyncio.sleep(0.02)


def _has(person: _Listener, last: dict[str, int]) -> bool:
    return all(s.numbers and s.numbers[-1] >= last[s.room] for s in person.subscriptions.values())


def _judge(people: Sequence[_Listener], last: dict[str, int]) -> Outcome:
    outcome = Outcome(0, 0, 0, 0, 0, sum(p.reconnects for p in people), [], last)
    for person in people:
        outcome.recovery_times += person.times
        for subscription in person.subscriptions.values():
            outcome.reported += subscription.reported
            expected: int | None = 1
            for number in subscription.numbers:
                if number == -1:
                    expected = None
                    continue
                outcome.received += 1
                if expected is not None and number > expected:
                    outcome.lost += number - expected
                elif expected is not None and number < expected:
                    outcome.doubled += number == expected - 1
                    outcome.disordered += number < expected - 1
                expected = max(number, (expected or 1) - 1) + 1
            if expected is not None:
                outcome.lost += max(0, last[subscription.room] - expected + 1)
            elif not subscription.numbers or subscription.numbers[-1] < last[subscription.room]:
                outcome.lost += 1
    return outcome
