"""A TCP proxy with named fault points, between the code under test and a real server."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Literal, Self
from urllib.parse import urlsplit, urlunsplit

from tests.support.machine import LOCAL
from tests.support.waiting import eventually

Direction = Literal["up", "down"]
"""``up``: from client to server."""


class Link:
    """One client's connection and its counterpart at the server."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = client
        self._to_client = to_client
        self._to_server: asyncio.StreamWriter | None = None
        self.said = bytearray()
        """The first bytes the client sent: tells a subscriber's connection from the others."""
        self.open = {"up": _opened(), "down": _opened()}
        self.swallow_next_reply = False

    async def run(self) -> None:
        try:
            await self.open["up"].wait()  # a black hole accepts and connects nowhere
            server, self._to_server = await asyncio.open_connection(*self._proxy.target)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump("up", self._client, self._to_server))
                tasks.create_task(self._pump("down", server, self._to_client))
        except* OSError:
            pass
        finally:
            self.abort()

    async def _pump(self, way: Direction, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        # Bounded: what is held back here is held back at the sender too, as on a real stalled path.
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        clock = asyncio.get_running_loop().time

        async def deliver() -> None:
            while True:
                due, chunk = await held.get()
                await asyncio.sleep(max(0.0, due - clock()))
                if way == "up":
                    self._note(chunk)
                await self.open[way].wait()
                if not chunk:
                    raise ConnectionResetError("end of stream")
                if self._passes(way, chunk):
                    sink.write(chunk)
                    await sink.drain()

        async def collect() -> None:
            while True:
                chunk = await source.read(65536)
                await held.put((clock() + self._proxy.latency, chunk))
                if not chunk:
                    return

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(deliver())
            tasks.create_task(collect())

    def _note(self, chunk: bytes) -> None:
        if len(self.said) < 16384:
            self.said += chunk
        if any(mark in self.said for mark in self._proxy.isolated):
            self.hold("up", "down")

    def hold(self, *ways: Direction) -> None:
        """Nothing gets through in these directions, until the proxy heals."""
        for way in ways:
            self.open[way].clear()

    def _passes(self, way: Direction, chunk: bytes) -> bool:
        proxy = self._proxy
        if way == "up":
            if proxy.lose_command is not None and proxy.lose_command in chunk:
                proxy.lose_command = None
                proxy.swallowed += 1
                self.abort()
                return False
            if proxy.swallow_reply_to is not None and proxy.swallow_reply_to in chunk:
                proxy.swallow_reply_to = None
                self.swallow_next_reply = True
            return True
        if self.swallow_next_reply:
            self.swallow_next_reply = False
            proxy.swallowed += 1
            if proxy.cut_after_swallow:
                self.abort()
            return False
        return True

    def abort(self, *, reset: bool = True) -> None:
        """End both halves now, with RST (or FIN), whatever is still under way."""
        for writer in (self._to_client, self._to_server):
            if writer is None:
                continue
            endpoint = writer.get_extra_info("socket")
            if reset and endpoint is not None and endpoint.fileno() >= 0:
                endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """``async with Proxy(server.url) as proxy``: give ``proxy.url`` to the code under test.

    ``only`` restricts a fault to connections that have sent those bytes (``b"SUBSCRIBE"``: the subscriber's).
    ``heal`` ends every fault. Nothing here waits: a fault holds from the next chunk on.
    """

    def __init__(self, url: str, *, port: int = 0) -> None:
        """``url``: of the server, or ``host:port``."""
        self._parts = urlsplit(url if "://" in url else f"tcp://{url}")
        assert self._parts.hostname is not None
        assert self._parts.port is not None
        self.target = (self._parts.hostname, self._parts.port)
        self.port = port
        self.links: set[Link] = set()
        self.accepted = 0
        """Connections that came in."""
        self.swallowed = 0
        """Replies and commands that were lost on purpose."""
        self.latency = 0.0
        self.lose_command: bytes | None = None
        self.swallow_reply_to: bytes | None = None
        self.cut_after_swallow = True
        self.isolated: tuple[bytes, ...] = ()
        self._refusing = False
        self._holding: frozenset[Direction] = frozenset()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """The server's URL with this proxy's address in it."""
        user, at, _ = self._parts.netloc.rpartition("@")
        return urlunsplit(self._parts._replace(netloc=f"{user}{at}{LOCAL}:{self.port}"))

    # Faults

    def cut(self, *, only: bytes | None = None, refuse: bool = True, reset: bool = True) -> int:
        """End connections (RST, or FIN with ``reset=False``); new ones meet the same until ``heal``, unless
        ``refuse=False``. Returns how many ended."""
        self._refusing = refuse and only is None
        hit = self._chosen(only)
        for link in hit:
            link.abort(reset=reset)
        return len(hit)

    def blackhole(self, *, only: bytes | None = None) -> None:
        """Connections stay, nothing gets through either way, new ones are accepted and lead nowhere."""
        self.stall("up", only=only)
        self.stall("down", only=only)

    def stall(self, way: Direction, *, only: bytes | None = None) -> None:
        """Hold back all bytes in one direction; they arrive after ``heal``, as if sent again by TCP."""
        if only is None:
            self._holding |= {way}
        for link in self._chosen(only):
            link.hold(way)

    def isolate(self, *marks: bytes) -> None:
        """As ``blackhole``, for the connections that have sent one of ``marks``, and for those that will."""
        self.isolated = marks
        for link in self.links:
            if any(mark in link.said for mark in marks):
                link.hold("up", "down")

    def delay(self, seconds: float) -> None:
        """Every chunk takes that much longer, in each direction; order stays."""
        self.latency = seconds

    def swallow(self, command: bytes = b"", *, cut: bool = True) -> None:
        """The next command that has these bytes is executed; its reply is lost (and the connection cut)."""
        self.swallow_reply_to, self.cut_after_swallow = command, cut

    def lose(self, command: bytes = b"") -> None:
        """The next command that has these bytes never arrives, and its connection is cut."""
        self.lose_command = command

    def heal(self) -> None:
        """No more faults; what was held back is delivered."""
        self.lose_command = self.swallow_reply_to = None
        self.isolated = ()
        self.latency, self._refusing, self._holding = 0.0, False, frozenset()
        for link in self.links:
            for gate in link.open.values():
                gate.set()

    def _chosen(self, only: bytes | None) -> list[Link]:
        return [link for link in self.links if only is None or only in link.said]

    # Life

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = Link(self, reader, writer)
        if self._refusing:
            link.abort()
            return
        link.hold(*self._holding)
        self.links.add(link)
        try:
            await link.run()
        finally:
            self.links.discard(link)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, LOCAL, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        self.heal()
        for link in list(self.links):
            link.abort()
        await eventually(lambda: not self.links)


def _opened() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate
