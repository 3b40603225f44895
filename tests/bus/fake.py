"""A server that speaks just enough RESP3 to misbehave on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

Answer = Callable[[list[bytes]], bytes | None]

HELLO = (
    b"%7\r\n+server\r\n+redis\r\n+version\r\n+7.4.0\r\n+proto\r\n:3\r\n+id\r\n:1\r\n"
    b"+mode\r\n+standalone\r\n+role\r\n+master\r\n+modules\r\n*0\r\n"
)


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


def push(*parts: bytes | int) -> bytes:
    encoded = [b":%d\r\n" % part if isinstance(part, int) else bulk(part) for part in parts]
    return b">%d\r\n" % len(parts) + b"".join(encoded)


class FakeServer:
    """``answers`` maps a command's first word to bytes, or to a function of the command; the rest answers as
    a server would.
    """

    def __init__(self, answers: dict[bytes, bytes | Answer] | None = None, *, version: str = "7.4.0") -> None:
        self.answers = answers or {}
        self.version = version
        self.commands: list[list[bytes]] = []
        self.reads = 0
        self.port = 0
        self.writers: list[asyncio.StreamWriter] = []

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for writer in self.writers:
            writer.close()
        await self._server.wait_closed()

    def say(self, data: bytes) -> None:
        """To the connection that came last."""
        self.writers[-1].write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        buffer = b""
        try:
            while chunk := await reader.read(65536):
                self.reads += 1
                buffer += chunk
                while (parsed := _command(buffer)) is not None:
                    command, buffer = parsed
                    self.commands.append(command)
                    writer.write(self._answer(command))
                await writer.drain()
        except OSError:
            return
        finally:
            writer.close()

    def _answer(self, command: list[bytes]) -> bytes:
        word = command[0].upper()
        answer = self.answers.get(word)
        if callable(answer):
            answer = answer(command)
        if answer is not None:
            return answer
        match word:
            case b"HELLO":
                return HELLO
            case b"INFO":
                return bulk(f"redis_version:{self.version}\r\nrun_id:abc\r\n".encode())
            case b"PING":
                return bulk(command[1]) if len(command) > 1 else b"+PONG\r\n"
            case b"SUBSCRIBE" | b"UNSUBSCRIBE" | b"SSUBSCRIBE" | b"SUNSUBSCRIBE":
                return b"".join(push(word.lower(), channel, 1) for channel in command[1:])
            case b"EVALSHA" if b":s:" in command[3]:
                return b"_\r\n"
            case b"EVALSHA":
                return b"*2\r\n:0\r\n*0\r\n"
            case b"EVAL" | b"PEXPIRE" | b"PUBLISH":
                return b":1\r\n"
        return b"+OK\r\n"


def _command(buffer: bytes) -> tuple[list[bytes], bytes] | None:
    head, found, rest = buffer.partition(b"\r\n")
    if not found:
        return None
    parts = []
    for _ in range(int(head[1:])):
        size, found, rest = rest.partition(b"\r\n")
        if not found or len(rest) < int(size[1:]) + 2:
            return None
        parts.append(rest[: int(size[1:])])
        rest = rest[int(size[1:]) + 2 :]
    return parts, rest
