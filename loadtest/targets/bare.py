"""The least possible cost: a ready frame and one system call for each socket.

``python -m loadtest.targets.bare PORT``. It answers the handshake and the control requests of the load test,
and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import sys
from typing import Any

from loadtest.processes import HOST
from loadtest.target import message

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_descriptors: list[int] = []
_published = 0


def _frame(value: dict[str, Any]) -> bytes:
    data = json.dumps(value, separators=(",", ":")).encode()
    length = bytes((len(data),)) if len(data) < 126 else b"\x7e" + len(data).to_bytes(2, "big")
    return b"\x81" + length + data


async def _publish(options: dict[str, float]) -> None:
    global _published
    for _ in range(int(options["count"])):
        frame = _frame(message(int(options["size"])))
        for descriptor in _descriptors:
            os.write(descriptor, frame)
        _published += 1
        await asyncio.sleep(options["gap"] / 1000)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            key = re.search(rb"(?i)sec-websocket-key: *(\S+)", head)
            if key is not None:
                accept = base64.b64encode(hashlib.sha1(key[1] + _GUID).digest())
                writer.write(b"HTTP/1.1 101 OK\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
                writer.write(b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n\x81\x05ready")
                _descriptors.append(writer.get_extra_info("socket").fileno())
                await reader.read()
                return
            path, _, query = head.split(b" ")[1].decode().partition("?")
            if path == "/publish":
                options = {name: float(value) for name, value in re.findall(r"(\w+)=([0-9.]+)", query)}
                await _publish(options)
            body = json.dumps({"published": _published, "busy": False}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    except (asyncio.IncompleteReadError, ConnectionError):
        return
    finally:
        writer.close()


async def main(port: int) -> None:
    server = await asyncio.start_server(_serve, HOST, port, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(int(sys.argv[1])))
