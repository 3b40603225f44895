"""The clients, in a process of their own: thousands of WebSockets on one epoll, counting what arrives."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import select
import socket
import struct
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import psutil

from loadtest.processes import HOST
from loadtest.target import MARK

_MARK = MARK.encode()
_TIME = re.compile(rb'\\?"t\\?": ?(\d+)')
_READY, _RECEIVED, _CLOSED, _FAILED = range(4)
_AT_ONCE = 100  # handshakes in progress at a time


@dataclass(frozen=True)
class Wire:
    """The messages of one kind of server: handshake, ready, ping."""

    path: str
    hellos: tuple[bytes, ...] = ()
    """Text frames sent after the handshake, in order. ``%ROOM%`` is the number of the socket's room."""
    ready: bytes = b"ready"
    """Bytes that arrive when this client is in the room."""
    ping: bytes = b""
    pong: bytes = b""
    """Text frames of the application protocol, not the pings of the WebSocket protocol."""


ENDPOINT = Wire(
    "/realtime/websocket",
    hellos=(b'{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"load"}}',),
    ready=b'"subscribe":',
    ping=b"{}",
    pong=b"{}",
)
ENDPOINT_ROOMS = replace(
    ENDPOINT, hellos=(b'{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"many:%ROOM%"}}',)
)
APP = Wire("/ws")
SOCKET_IO = Wire("/socket.io/?EIO=4&transport=websocket", hellos=(b"40",), ping=b"2", pong=b"3")


@dataclass(frozen=True)
class Plan:
    """The work of one generator."""

    wire: Wire
    ports: Sequence[int]
    """Sockets are spread over these."""
    sockets: int
    cookies: Sequence[str] = ()
    """One for each socket, by number; empty: none."""
    latency: bool = False
    """Whether the age of each message is measured when it arrives. That takes CPU time of the generator, so
    it is off for saturated runs.
    """
    rooms: int = 1
    """Sockets are spread over this number of rooms."""
    stalled: int = 0
    """This number of sockets, the first ones, stop reading when they are ready."""


@dataclass
class Report:
    """The messages that arrived."""

    per_socket: Sequence[int]
    latencies: Sequence[float]
    """Seconds from sending to arrival, in order of arrival."""
    closes: Sequence[tuple[int, int, float]]
    """``(socket, code, monotonic time)``."""
    errors: Sequence[str]

    @property
    def received(self) -> int:
        return sum(self.per_socket)

    def complete(self, sent: int, *, skip: int = 0) -> bool:
        """Whether every socket got exactly what was sent."""
        return all(count == sent for count in self.per_socket[skip:])


class Crowd:
    """A running generator, as the load test uses it."""

    def __init__(self, plan: Plan, counters: Any, pipe: Connection, pid: int) -> None:
        self.plan = plan
        self.pid = pid
        self.last_arrival = 0.0
        """When ``wait_received`` last saw the number of messages grow, on the monotonic clock."""
        self._counters = counters
        self._pipe = pipe

    @property
    def received(self) -> int:
        """Messages that all sockets together have received so far."""
        return int(self._counters[_RECEIVED])

    @property
    def closed(self) -> int:
        return int(self._counters[_CLOSED])

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Wait until every socket is in the room.

        Raises:
            RuntimeError: a socket failed to connect, or ``timeout`` seconds are over.
        """
        self._wait(lambda: self._counters[_READY] + self._counters[_FAILED] >= self.plan.sockets, timeout)
        if self._counters[_FAILED]:
            raise RuntimeError(f"sockets failed to connect: {self.stop().errors[:3]}")

    def wait_received(self, number: int, patience: float = 3.0) -> bool:
        """Wait until ``number`` messages have arrived; False when none came for ``patience`` seconds."""
        last, self.last_arrival = self.received, time.monotonic()
        while last < number:
            time.sleep(0.002)
            if (now := self.received) != last:
                last, self.last_arrival = now, time.monotonic()
            elif time.monotonic() - self.last_arrival > patience:
                return False
        return True

    def cpu(self) -> float:
        """Seconds of CPU the generator has used."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def wait_closed(self, number: int, timeout: float = 10.0) -> bool:
        return self._wait(lambda: self.closed >= number, timeout, fail=False)

    def _wait(self, condition: Callable[[], bool], timeout: float, *, fail: bool = True) -> bool:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                if fail:
                    raise RuntimeError(f"generator: {list(self._counters)} after {timeout:g} s")
                return False
            if self._pipe.poll():  # it writes nothing before ``stop``: this is the end of its pipe
                raise RuntimeError("the generator ended too early: its traceback is above")
            time.sleep(0.002)
        return True

    def stop(self) -> Report:
        """End the generator; returns what arrived."""
        self._pipe.send("stop")
        if not self._pipe.poll(60):
            raise RuntimeError("the generator did not send its report within 60 s")
        report: Report = self._pipe.recv()
        return report


@contextmanager
def crowd(plan: Plan) -> Iterator[Crowd]:
    """Clients that begin to connect at once; call ``wait_ready`` before use."""
    context = multiprocessing.get_context("spawn")
    counters = context.RawArray("q", 4)
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(plan, counters, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        yield Crowd(plan, counters, ours, process.pid)
    finally:
        ours.close()
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def _main(plan: Plan, counters: Any, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    _Generator(plan, counters, pipe).run()


@dataclass(eq=False, slots=True)
class _Client:
    number: int
    socket: socket.socket
    buffer: bytes = b""
    upgraded: bool = False
    ready: bool = False
    greeted: int = field(default=0)


class _Generator:
    def __init__(self, plan: Plan, counters: Any, pipe: Connection) -> None:
        self._plan = plan
        self._counters = counters
        self._pipe = pipe
        self._epoll = select.epoll()
        self._clients: dict[int, _Client] = {}
        self._per_socket = array("q", bytes(8 * plan.sockets))
        self._latencies = array("d")
        self._closes: list[tuple[int, int, float]] = []
        self._errors: list[str] = []
        wire = plan.wire
        self._view = memoryview(bytearray(262144))
        self._ping = bytes((0x81, len(wire.ping))) + wire.ping if wire.ping else b""
        self._pong = _masked(wire.pong)
        # Frames are parsed only when the scenario needs single ones; else marks are counted in whole chunks.
        self._careful = bool(plan.cookies)

    def run(self) -> None:
        self._epoll.register(self._pipe.fileno(), select.EPOLLIN)
        started = 0
        while True:
            under_way = started - self._counters[_READY] - self._counters[_FAILED]
            while started < self._plan.sockets and under_way < _AT_ONCE:
                self._connect(started)
                started, under_way = started + 1, under_way + 1
            for descriptor, _ in self._epoll.poll(1.0):
                if descriptor == self._pipe.fileno():
                    self._finish()
                    return
                self._read(self._clients[descriptor])

    def _finish(self) -> None:
        try:
            self._pipe.recv()
        except EOFError:
            return
        report = Report(self._per_socket, self._latencies, self._closes, self._errors)
        self._pipe.send(report)
        for client in self._clients.values():
            client.socket.close()

    def _connect(self, number: int) -> None:
        plan = self._plan
        port = plan.ports[number % len(plan.ports)]
        connection = socket.create_connection((HOST, port), timeout=20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        cookie = f"Cookie: {plan.cookies[number]}\r\n" if plan.cookies else ""
        connection.sendall(
            f"GET {plan.wire.path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            f"Sec-WebSocket-Version: 13\r\n{cookie}\r\n".encode()
        )
        connection.setblocking(False)
        self._clients[connection.fileno()] = _Client(number, connection)
        self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _read(self, client: _Client) -> None:
        try:
            # Into one buffer: a large bytes object for each read costs more than the read.
            chunk = bytes(self._view[: client.socket.recv_into(self._view)])
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._gone(client, 1006)
        elif not client.ready:
            self._greet(client, chunk)
        elif self._careful:
            self._take_frames(client, chunk)
        elif self._plan.latency:
            self._take_ages(client, chunk)
        else:
            self._count(client, chunk)

    def _greet(self, client: _Client, chunk: bytes) -> None:
        client.buffer += chunk
        if not client.upgraded:
            head, end, rest = client.buffer.partition(b"\r\n\r\n")
            if not end:
                return
            if b" 101 " not in head.split(b"\r\n")[0]:
                self._fail(client, head[:200].decode(errors="replace"))
                return
            client.upgraded, client.buffer = True, rest
            for hello in self._plan.wire.hellos:
                room = b"%d" % (client.number % self._plan.rooms)
                client.socket.sendall(_masked(hello.replace(b"%ROOM%", room)))
        if self._plan.wire.ready in client.buffer:
            # Messages in the same chunk are counted too. A frame that is cut in two here starts a new count.
            client.ready, rest, client.buffer = True, client.buffer, b""
            self._counters[_READY] += 1
            if client.number < self._plan.stalled:
                self._epoll.unregister(client.socket.fileno())
            elif rest.count(_MARK):
                self._add(client, rest.count(_MARK))

    def _count(self, client: _Client, chunk: bytes) -> None:
        # A mark has two bytes and may be cut in two: the first byte is kept for the next chunk.
        data = client.buffer + chunk
        self._add(client, data.count(_MARK))
        client.buffer = _MARK[:1] if data.endswith(_MARK[:1]) and not data.endswith(_MARK) else b""
        if self._ping and self._ping in chunk:
            client.socket.sendall(self._pong)

    def _take_ages(self, client: _Client, chunk: bytes) -> None:
        now = time.monotonic_ns()
        data = client.buffer + chunk
        if self._ping and self._ping in chunk:
            client.socket.sendall(self._pong)
        if not data.endswith((b"}", b"]")):
            client.buffer = data  # every message ends like this, so the last one is incomplete
            return
        client.buffer = b""
        sent = _TIME.findall(data)
        self._add(client, len(sent))
        for when in sent:
            self._latencies.append((now - int(when)) / 1e9)

    def _take_frames(self, client: _Client, chunk: bytes) -> None:
        data = client.buffer + chunk
        now = time.monotonic()
        position = 0
        while len(data) - position >= 2:
            start, size = position + 2, data[position + 1]
            if size == 126:
                start, size = position + 4, int.from_bytes(data[position + 2 : position + 4], "big")
            elif size == 127:
                start, size = position + 10, int.from_bytes(data[position + 2 : position + 10], "big")
            if len(data) < start + size or len(data) < start:
                break
            opcode, payload = data[position] & 15, data[start : start + size]
            position = start + size
            if opcode == 8:
                client.buffer = b""
                self._gone(client, struct.unpack("!H", payload[:2])[0] if size >= 2 else 1005, now)
                return
            if payload == self._plan.wire.ping:
                client.socket.sendall(self._pong)
            elif number := payload.count(_MARK):
                self._add(client, number)
        client.buffer = data[position:]

    def _add(self, client: _Client, number: int) -> None:
        self._per_socket[client.number] += number
        self._counters[_RECEIVED] += number

    def _gone(self, client: _Client, code: int, when: float | None = None) -> None:
        if not client.ready:
            self._fail(client, f"closed with code {code} before it was ready")
            return
        self._closes.append((client.number, code, when or time.monotonic()))
        self._counters[_CLOSED] += 1
        self._drop(client)

    def _fail(self, client: _Client, why: str) -> None:
        self._errors.append(why)
        self._counters[_FAILED] += 1
        self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._epoll.unregister(client.socket.fileno())
        del self._clients[client.socket.fileno()]
        client.socket.close()


def _masked(payload: bytes) -> bytes:
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else bytes((0xFE,)) + size.to_bytes(2, "big")
    mask = os.urandom(4)
    return b"\x81" + length + mask + bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
