"""Many clients in a process of their own: ``python -m tests.realtime.crowd URL ROOM COUNT READING``.

Raw sockets that connect, subscribe to one room and throw away what they get; the first ``COUNT - READING`` of
them stop reading after that. Prints how many are subscribed, then lives until its standard input ends.
"""

from __future__ import annotations

import selectors
import socket
import struct
import sys
from urllib.parse import urlsplit

_AT_ONCE = 200  # handshakes under way, well below any listen backlog


def _frame(text: bytes) -> bytes:
    size = bytes([0x80 | len(text)]) if len(text) < 126 else b"\xfe" + struct.pack(">H", len(text))
    return b"\x81" + size + b"\0\0\0\0" + text  # masked with zeros


def main() -> None:
    """Run until standard input ends."""
    url, room, count, reading = urlsplit(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    assert url.hostname
    assert url.port
    request = (
        f"GET {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()
    commands = _frame(f'{{"id":1,"connect":{{}}}}\n{{"id":2,"subscribe":{{"channel":"{room}"}}}}'.encode())
    sockets: list[socket.socket] = []
    selector = selectors.DefaultSelector()
    while len(sockets) < count:
        batch = []
        for _ in range(min(_AT_ONCE, count - len(sockets))):
            made = socket.create_connection((url.hostname, url.port))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            made.sendall(request)
            batch.append(made)
        for made in batch:
            got = b""
            while b"\r\n\r\n" not in got:
                got += made.recv(4096)
            assert got.startswith(b"HTTP/1.1 101"), got[:80]
            made.sendall(commands)
        for made in batch:
            got = b""
            while b'"id":2' not in got:
                got += made.recv(4096)
            assert b'"error"' not in got, got
            made.setblocking(False)
        sockets += batch
    for made in sockets[count - reading :]:
        selector.register(made, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    print(len(sockets), flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                return
            try:
                if not key.fileobj.recv(1 << 18):  # type: ignore[union-attr]
                    selector.unregister(key.fileobj)
            except BlockingIOError:
                pass
            except OSError:
                selector.unregister(key.fileobj)


if __name__ == "__main__":
    main()
