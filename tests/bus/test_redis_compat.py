"""What is used of redis-py and is not its public API: it is there, and does what it is used for."""

from __future__ import annotations

import ast
import asyncio
import math
import re
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from redis.exceptions import ConnectionError

from asgi_cluster.backends.redis.address import Address
from asgi_cluster.backends.redis.compat import ContextConnection, receive_pushes, writer_of
from tests.bus.fake import FakeServer, push
from tests.support.machine import ROOT


@contextmanager
def advice(name: str, use: str) -> Iterator[None]:
    """A failure says what to do."""
    try:
        yield
    except Exception as error:
        pytest.fail(
            f"redis-py {redis.__version__} has changed {name}, which asgi_cluster/backends/redis/compat.py "
            f"uses {use} ({type(error).__name__}: {error}).\n"
            "1. Bound the version in pyproject.toml: redis < this one, and release that.\n"
            "2. Look for the new name in redis/asyncio/connection.py and redis/_parsers/, of "
            "_AsyncRESP3Parser and of _AsyncHiredisParser, and change compat.py alone.\n"
            "3. If there is none any more: hiredis.Reader under an asyncio.Protocol can take the place of "
            "redis-py's connection in MultiplexedConnection (compat.py has the measurement)."
        )


def read(connection: Any) -> Any:
    return connection.read_response(
        disable_decoding=True, timeout=math.inf, push_request=True, disconnect_on_error=False
    )


async def test_pushes_go_to_a_handler(parser: str) -> None:
    """Parsed, as bytes, inside the read, which returns what the handler returns; replies stay in order."""
    seen: list[Sequence[Any]] = []
    marker = object()

    async def handler(pushed: Sequence[Any]) -> Any:
        seen.append(list(pushed))
        return marker

    async with FakeServer() as server:
        connection = Address(server.url).connection()
        await connection.connect()
        try:
            with advice("the push handler of a connection's parser", "to get pushes in order with replies"):
                receive_pushes(connection, handler)
                server.say(push(b"message", b"channel", b"payload") + b"+reply\r\n")
                assert await read(connection) is marker
                assert seen == [[b"message", b"channel", b"payload"]]
                assert await read(connection) == b"reply"
        finally:
            await connection.disconnect()


async def test_commands_are_written_by_ourselves(parser: str) -> None:
    """Packed ones, several in one write; the transport shows how much waits and can be aborted."""
    async with FakeServer() as server:
        connection = Address(server.url).connection()
        await connection.connect()
        try:
            with advice("the stream writer of a connection", "to write the commands of one tick at once"):
                writer = writer_of(connection)
                one, two = connection.pack_command("PING", "1"), connection.pack_command("PING", "2")
                writer.write(b"".join([*one, *two]))
                assert [await read(connection) for _ in range(2)] == [b"1", b"2"]
                assert writer.transport.get_write_buffer_size() == 0
                writer.transport.abort()
                with pytest.raises((ConnectionError, OSError)):
                    await read(connection)
        finally:
            await connection.disconnect(nowait=True)


async def test_tls_takes_the_context_of_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of the subclass are the ones that the connection is opened with."""
    opened: list[dict[str, Any]] = []

    async def open_connection(**options: Any) -> Any:
        opened.append(options)
        raise OSError("refused by the test")

    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    context = ssl.create_default_context()
    with advice("SSLConnection._connection_arguments", "to pass the application's ssl_context on"):
        connection = Address("rediss://localhost:1", ssl_context=context).connection()
        assert isinstance(connection, ContextConnection)
        with pytest.raises(ConnectionError):
            await connection.connect()  # type: ignore[no-untyped-call]
        assert opened
        assert all(options["ssl"] is context for options in opened)


def test_private_attributes_are_used_in_one_module() -> None:
    """No other module of the folder reaches into an object that is not its own."""
    found = {
        path.name
        for path in (ROOT / "asgi_cluster/backends/redis").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and re.match("_[^_]", node.attr)
        and ast.unparse(node.value) not in ("self", "other")
    }
    assert found == {"compat.py"}
