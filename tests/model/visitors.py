"""One visitor's parallel requests to several nodes, one step at a time, and a plain model of their outcome.

The requests run through the real middleware. A step is an action of an app, the sending of a store operation,
or the arrival of its reply: which request makes the next one is chosen from outside. A store operation may be
refused, get lost, or lose its reply; a node may be *deaf*: invalidations wait until it is healed.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from asgi_cluster import Cluster, ClusterMiddleware, Session, StoreUnavailable, get_session
from asgi_cluster.ids import Handle, UserId, secret_hash
from asgi_cluster.sessions.receipts import PendingAck

GONE = "(removed)"
COOKIE = "__Host-session="
READS = ("read", "devices")


@dataclass
class Write:
    """A value (or ``GONE``) that a request put under a key; ``end`` is when its save was confirmed."""

    handle: str
    key: str
    value: Any
    start: float
    end: float = math.inf


@dataclass
class End:
    """A session was to be over: by ``logout``, ``clear`` or ``login``. ``at``: when that was confirmed."""

    handle: str
    by: str
    at: float = math.inf


@dataclass
class Asked:
    """What one request does, one action after the other."""

    node: int
    actions: Sequence[tuple[Any, ...]]
    stubborn: bool
    """It catches errors of the store and goes on."""
    late: bool = False
    """It carries the cookie that the browser had before its last one."""


@dataclass(eq=False)
class Running:
    asked: Asked
    task: asyncio.Task[None] | None = None
    waiting: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        return self.task is not None and self.task.done()

    @property
    def busy(self) -> bool:
        return self.waiting is None and not self.done


class Deaf:
    """Between the bus and a node: while it is deaf, messages wait."""

    def __init__(self, cluster: Cluster) -> None:
        self._hear = cluster._parts.dispatch.session_message
        self._held: list[bytes] = []
        self.deaf = False
        cluster._parts.dispatch.session_message = self._message  # type: ignore[method-assign]

    def _message(self, payload: bytes) -> None:
        if self.deaf:
            self._held.append(payload)
        else:
            self._hear(payload)

    def heal(self) -> None:
        self.deaf = False
        held, self._held = self._held, []
        for payload in held:
            self._hear(payload)


class Store:
    """A node's way to the store, whose operations wait for their turn and may fail."""

    def __init__(self, store: Any, site: Visitor) -> None:
        self._store = store
        self._site = site

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)
        if name == "run_id":
            return operation

        async def run(*args: Any, **kwargs: Any) -> Any:
            site = self._site
            fault = site.next_fault()
            await site.turn()
            if fault == "refused":
                raise StoreUnavailable("refused")
            answer = None if fault == "lost" else await operation(*args, **kwargs)
            await site.turn()
            if fault in ("lost", "unanswered"):
                raise StoreUnavailable("no answer", outcome_unknown=name not in READS)
            return answer

        return run


class Visitor:
    """The browser, its requests, and the model."""

    def __init__(self, clusters: Sequence[Cluster], *, exact: bool) -> None:
        self.clusters = clusters
        self.exact = exact
        """What one node has done reaches the others at once, unless they are deaf."""
        self.truth = clusters[0]._parts.service.store
        self.buses = [Deaf(cluster) for cluster in clusters]
        self.faults: list[str] = []
        for cluster in clusters:
            service, store = cluster._parts.service, Store(cluster._parts.service.store, self)
            for part in (service, service.reader, service.committer, service.logins, service.logouts):
                part.store = store
        self.now = 0
        self.numbers = iter(range(1, 10_000))
        self.cookie = self.earlier = ""
        self.delivered: set[str] = set()
        self.users: set[str] = set()
        self.parents: dict[str, str] = {}
        self.writes: list[Write] = []
        self.ends: list[End] = []
        self.running: list[Running] = []
        self._stopped = asyncio.Event()

    # Steps

    def next_fault(self) -> str:
        return self.faults.pop(0) if self.faults and self._me() is not None else ""

    def _me(self) -> Running | None:
        current = asyncio.current_task()
        return next((running for running in self.running if running.task is current), None)

    async def turn(self) -> None:
        """Wait until this request is the one that goes on. Work that is no request's is not held up."""
        running = self._me()
        if running is not None:
            running.waiting = asyncio.get_running_loop().create_future()
            self._stopped.set()
            await running.waiting

    async def settle(self) -> None:
        """Until every request waits for its turn, or for another one's read, or is done."""
        for _ in range(40):
            if not any(running.busy for running in self.running):
                return
            await asyncio.sleep(0)
        while self.running and all(running.busy or running.done for running in self.running):
            if all(running.done for running in self.running):
                return
            self._stopped.clear()
            await self._stopped.wait()

    async def step(self, choice: int) -> bool:
        """Let one of the waiting requests go on; False when all are done."""
        await self.settle()
        waiting = [each for each in self.running if each.waiting is not None]
        if not waiting:
            return False
        self.now += 1
        chosen = waiting[choice % len(waiting)]
        future, chosen.waiting = chosen.waiting, None
        assert future is not None
        future.set_result(None)
        await self.settle()
        return True

    def start(self, asked: Asked) -> None:
        running = Running(asked)
        self.running.append(running)
        running.task = asyncio.create_task(self._request(asked))
        running.task.add_done_callback(lambda _: self._stopped.set())

    async def together(
        self, requests: Sequence[Asked], order: Sequence[int], deaf: Sequence[int] = ()
    ) -> None:
        """These requests in parallel, with their steps in this order, while these nodes get no messages."""
        for node, bus in enumerate(self.buses):
            if node in deaf:
                bus.deaf = True
            else:
                bus.heal()
        for asked in requests:
            self.start(asked)
        for choice in itertools.chain(order, itertools.repeat(0)):
            if not await self.step(choice):
                break
        for running in self.running:
            assert running.task is not None
            await running.task
        self.running.clear()

    async def finish(self) -> None:
        """All nodes receive what has waited, and what was to be ended later is ended."""
        self.faults.clear()
        for bus in self.buses:
            bus.heal()
        for cluster in self.clusters:
            await cluster._parts.service.logouts.tombstones._check()

    # One request

    async def _request(self, asked: Asked) -> None:
        await self.turn()
        cluster, begun = self.clusters[asked.node], self.now
        cookie = self.earlier if asked.late else self.cookie
        sent: list[Any] = []
        done: list[Actions] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            done.append(Actions(self, get_session(scope), asked, begun))
            await done[0].run()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "headers": [(b"cookie", cookie.encode())] if cookie else [],
            "scheme": "https",
        }
        await ClusterMiddleware(app, cluster)(scope, receive, send)
        for name, value in sent[0]["headers"]:
            if name == b"set-cookie":
                text = value.decode().split(";")[0]
                self.delivered.add(text.removeprefix(COOKIE).rpartition(".")[0])
                if not asked.late:
                    self.earlier, self.cookie = self.cookie, "" if b"Max-Age=0" in value else text
        if done and sent[0]["status"] == 200:
            done[0].answered()

    # What must hold

    def superseded(self, write: Write, line: Sequence[str], before: float = math.inf) -> Write | None:
        """A write that began when this one was done, and was confirmed."""
        return next(
            (
                later
                for later in self.writes
                if later.handle in line
                and later.key == write.key
                and later.start > write.end
                and later.end < before
            ),
            None,
        )

    def check_contents(self, data: dict[str, Any], line: Sequence[str], before: float = math.inf) -> None:
        for key in ("a", "b", "l"):
            value = data.get(key, GONE)
            written = [w for w in self.writes if w.handle in line and w.key == key and w.value == value]
            if value == GONE:
                written.append(Write(line[0], key, GONE, -1, -1))
            assert written, f"no request wrote {key}={value!r}"
            lost = [self.superseded(write, line, before) for write in written]
            assert None in lost, f"{key}={value!r}, and lost is {lost}"

    def line_of(self, handle: str) -> list[str]:
        """The session and those that went into it by a login. A session that another request ended, too, did
        not go into this one, or not wholly.
        """
        line = [handle]
        while (parent := self.parents.get(line[-1])) is not None:
            if len([end for end in self.ends if end.handle == parent]) > 1:
                return []
            line.append(parent)
        return line

    async def check(self) -> None:
        """At the end."""
        for user in self.users:
            listed = {device.handle for device in await self.truth.devices(UserId(user), timeout=5)}
            assert listed <= self.delivered, f"orphans of {user}: {listed - self.delivered}"
        for end in self.ends:
            if end.at < math.inf:
                assert await self.truth.read(Handle(end.handle), timeout=5) is None, f"{end} did not hold"
        if not self.cookie:
            return
        handle, _, secret = self.cookie.removeprefix(COOKIE).rpartition(".")
        record = await self.truth.read(Handle(handle), timeout=5)
        if record is None:
            if not any(end.handle == handle for end in self.ends):
                self.check_contents({}, [handle])
            return
        assert secret_hash(secret.encode()) in (record.secret, record.previous)
        data = {key: msgspec.msgpack.decode(value) for key, value in record.fields.items()}
        if line := self.line_of(handle):
            self.check_contents(data, line)


class Actions:
    """An app, and its own account of what it did."""

    def __init__(self, visitor: Visitor, session: Session, asked: Asked, begun: float) -> None:
        self.visitor = visitor
        self.session = session
        self.asked = asked
        self.begun = begun
        self.dirty: dict[str, Any] = {}
        self.list: list[Any] | None = None
        self.over = False
        self.cleared: list[End] = []
        self.last: list[Write] = []

    async def run(self) -> None:
        self._check_view()
        for name, *arguments in self.asked.actions:
            await self.visitor.turn()
            if self.over:
                return
            try:
                result = getattr(self, name)(*arguments)
                if result is not None:
                    await result
            except StoreUnavailable:
                if not self.asked.stubborn:
                    raise
        self.last = self._writing()

    def answered(self) -> None:
        """What was not saved by then is saved before the response."""
        if not self.over and self.session.work.state != "lost":
            self._saved(self.last)

    @property
    def handle(self) -> str | None:
        record = self.session.work.record
        return None if record is None else record.handle

    def _check_view(self) -> None:
        visitor, handle = self.visitor, self.handle
        if handle is None or not visitor.exact or visitor.buses[self.asked.node].deaf:
            return
        ended = [end for end in visitor.ends if end.handle == handle and end.at < self.begun]
        assert not ended, f"served after {ended}"
        if line := visitor.line_of(handle):
            # Past what the app does: a look of its own would count as one.
            visitor.check_contents(dict(dict.items(self.session)), line, before=self.begun)

    # What an app does

    def set(self, key: str) -> None:
        self.session[key] = self.dirty[key] = next(self.visitor.numbers)

    def set_same(self, key: str) -> None:
        if key in self.session:
            self.session[key] = self.dirty[key] = self.session[key]

    def remove(self, key: str) -> None:
        if key in self.session:
            del self.session[key]
            self.dirty[key] = GONE
            if key == "l":
                self.list = None

    def append(self) -> None:
        """Through a reference that is kept for the whole request."""
        if self.list is None:
            self.list = self.session.setdefault("l", [])
        self.list.append(next(self.visitor.numbers))
        self.dirty["l"] = self.list

    def clear(self) -> None:
        if self.handle is not None:
            self.cleared.append(End(self.handle, "clear"))
            self.visitor.ends.append(self.cleared[-1])
        self.session.clear()
        self._forget()

    def _forget(self) -> None:
        self.dirty, self.list = {}, None

    async def save(self) -> None:
        writes = self._writing()
        if await self.session.save():
            self._saved(writes)
            self.dirty = {}
        else:
            self.over = True  # its session is: ``save`` has said so, and later changes go nowhere

    def _saved(self, writes: Sequence[Write]) -> None:
        for end in self.cleared:
            end.at = min(end.at, self.visitor.now)
        for write in writes:
            write.handle = write.handle or self.handle or ""
            over = [end for end in self.visitor.ends if end.handle == write.handle and end.at < write.start]
            assert not over, f"{write} was acknowledged after {over}"
            write.end = self.visitor.now

    def _writing(self) -> list[Write]:
        before = self.handle or ""
        writes = [
            Write(before, key, copy.deepcopy(value), self.visitor.now) for key, value in self.dirty.items()
        ]
        self.visitor.writes += writes
        return writes

    async def login(self, user: str) -> None:
        visitor, session = self.visitor, self.session
        visitor.users.add(user)
        old = session.work.pending_end or self.handle
        kept = session.user_id in (None, user) and session.work.pending_end is None
        if session.user_id not in (None, user):
            self._forget()
        end = End(old or "", "login")
        if old is not None:
            visitor.ends.append(end)
        writes = self._writing()
        await session.login(user)
        end.at = visitor.now
        new = self.handle
        assert new is not None
        if old is not None and kept:
            visitor.parents[new] = old
        for write in writes:
            write.handle, write.end = new, visitor.now
        self.dirty = {}

    async def rotate(self) -> None:
        await self.session.rotate()
        if self.session.work.record is None and self.session.work.state == "lost":
            self.over = True

    async def logout(self) -> None:
        handle = self.session.work.pending_end or self.handle
        end = End(handle or "", "logout")
        if handle is not None:
            self.visitor.ends.append(end)
        await self.session.logout(timeout=0)
        end.at = self.visitor.now
        self._forget()


@contextmanager
def acknowledgements_at_once() -> Iterator[None]:
    """A node that has not acknowledged when the end is committed does not do so: nothing waits by the
    clock.
    """

    async def wait_for(self: PendingAck, nodes: Sequence[str], *, timeout: float) -> bool:
        return set(nodes) <= self.acked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PendingAck, "wait_for", wait_for)
        yield
