"""What a node makes of what sentinels say, without the minutes that a real failover takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from asgi_cluster.exceptions import StoreUnavailable
from tests.bus.fake import FakeServer, bulk, push
from tests.bus.nodes import opened
from tests.support.waiting import eventually


class Sentinel(FakeServer):
    """One sentinel of the service ``mymaster``."""

    def __init__(self, primary: FakeServer, *, service: str = "mymaster") -> None:
        super().__init__({b"SENTINEL": self._told})
        self.primary = primary
        self.epoch = 1
        self._service = service.encode()

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.port}/mymaster/0"

    def _told(self, command: list[bytes]) -> bytes:
        if command[2] != self._service:
            return (
                b"_\r\n"
                if command[1] == b"GET-MASTER-ADDR-BY-NAME"
                else b"-ERR No such master with that name\r\n"
            )
        if command[1] == b"GET-MASTER-ADDR-BY-NAME":
            return b"*2\r\n" + bulk(b"127.0.0.1") + bulk(b"%d" % self.primary.port)
        return b"%1\r\n" + bulk(b"config-epoch") + bulk(b"%d" % self.epoch)

    def failed_over(self, new: FakeServer) -> bytes:
        """The message of the failover, which the sentinel has recorded."""
        old, self.primary, self.epoch = self.primary, new, self.epoch + 1
        news = f"mymaster 127.0.0.1 {old.port} 127.0.0.1 {new.port}".encode()
        return push(b"message", b"+switch-master", news)


def primary() -> FakeServer:
    """With a configuration that needs no warning."""
    return FakeServer({b"CONFIG": b"%1\r\n" + bulk(b"min-replicas-to-write") + bulk(b"1")})


def beats(server: FakeServer) -> Callable[[], bool]:
    """Whether heartbeats have arrived there since this call."""
    seen = len(server.commands)
    return lambda: any(command[0] == b"PEXPIRE" for command in server.commands[seen:])


async def test_node_follows_the_message_of_a_failover(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    """The old primary still answers: the node leaves it all the same, and is served by the new one."""
    async with (
        primary() as old,
        primary() as new,
        Sentinel(old) as sentinel,
        opened(sentinel.url, prefix) as node,
    ):
        assert node.live
        sentinel.say(sentinel.failed_over(new))
        await eventually(beats(new))
        await eventually(lambda: node.live)
        await eventually(lambda: len(node.receiver.of("gap")) == 2)  # lost, and subscribed again
        assert f"the primary of mymaster is now 127.0.0.1:{new.port}" in caplog.text
        assert new.commands
        again = push(b"message", b"+switch-master", b"other 127.0.0.1 1 127.0.0.1 2")
        sentinel.say(again)  # of another service
        sentinel.say(push(b"message", b"+switch-master", f"mymaster h 1 127.0.0.1 {new.port}".encode()))
        await eventually(beats(new))
        assert len(node.receiver.of("gap")) == 2


async def test_failover_while_the_sentinel_was_away(prefix: str) -> None:
    """A message that was missed is made up for when the sentinel is back: it has a newer epoch."""
    async with (
        primary() as old,
        primary() as new,
        Sentinel(old) as sentinel,
        opened(sentinel.url, prefix) as node,
    ):
        sentinel.failed_over(new)
        sentinel.writers[0].close()
        await eventually(beats(new), timeout=10)
        await eventually(lambda: node.live)


async def test_service_that_no_sentinel_has(prefix: str) -> None:
    """The start fails, and the error names the service."""
    async with primary() as server, Sentinel(server, service="another") as sentinel:
        with pytest.raises(StoreUnavailable, match="has no service 'mymaster'"):
            async with opened(sentinel.url, prefix):
                pytest.fail("it started")
