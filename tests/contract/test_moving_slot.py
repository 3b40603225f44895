"""Sessions while their Redis Cluster slot moves, key by key, from one primary to another.

In between, the keys of one user are on two servers, and a script sees only those of one. The topology here is
as simple as it can be: it follows redirects and repeats what is answered with TRYAGAIN.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, cast

import pytest
import redis

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.scripts import Script
from asgi_cluster.backends.redis.store import RedisSessionStore
from asgi_cluster.backends.redis.topology import Topology
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import UserId, bucket_of, new_token
from asgi_cluster.sessions.store import UNKNOWN_NODES, NewSession
from tests.contract.drafts import alive, create, end, end_all, last_logout, rotate, write
from tests.contract.sites import TIMEOUT
from tests.support.machine import LOCAL
from tests.support.servers import Server
from tests.support.topologies import RedisCluster, start_redis_cluster

BUCKET = f"{bucket_of('ann'):02x}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with start_redis_cluster(replicas=0) as cluster:
        yield cluster


class Followed:
    """A topology for one slot."""

    sharded = True

    def __init__(self, first: Server) -> None:
        self._at = first.port
        self.repeated = 0
        self.refused: tuple[str, ...] = ()

    async def call(self, key: str, *args: str | bytes | int, timeout: float) -> Any:
        if args[0] in self.refused:
            raise StoreUnavailable("refused")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        port, asking = self._at, False
        while True:
            with redis.Redis(port=port, single_connection_client=True) as client:
                try:
                    if asking:
                        client.execute_command("ASKING")
                    return client.execute_command(*args)
                except redis.exceptions.MovedError as moved:
                    port, asking = moved.port, False
                except redis.exceptions.AskError as elsewhere:
                    port, asking = elsewhere.port, True
                except redis.exceptions.TryAgainError as error:
                    self.repeated += 1
                    port, asking = self._at, False
                    if loop.time() > deadline:
                        raise StoreUnavailable("TRYAGAIN") from error
                    await asyncio.sleep(0.01)
                except redis.ResponseError as error:
                    raise StoreUnavailable(str(error)) from error

    async def run(
        self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int], *, timeout: float
    ) -> Any:
        return await self.call(keys[0], "EVAL", script.source, len(keys), *keys, *args, timeout=timeout)


class Move:
    """A slot on its way: ``take(key)`` moves one key, ``finish`` the rest."""

    def __init__(self, cluster: RedisCluster, slot: int) -> None:
        self._cluster, self._slot = cluster, slot
        self.source = cluster.primary_of(slot)
        self.target = next(node for node in cluster.primaries() if node is not self.source)
        with self.source.client() as source, self.target.client() as target:
            ids = source.execute_command("CLUSTER", "MYID"), target.execute_command("CLUSTER", "MYID")
            target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
            source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])

    def take(self, *keys: str) -> None:
        with self.source.client() as source:
            source.execute_command("MIGRATE", LOCAL, self.target.port, "", 0, 5000, "REPLACE", "KEYS", *keys)

    def finish(self) -> None:
        self._cluster.move([self._slot], self.target)


@pytest.fixture
async def moving(
    cluster: RedisCluster,
) -> AsyncIterator[tuple[RedisSessionStore, Followed, Names, Callable[[], Move]]]:
    names = Names(f"t{new_token()}", sharded=True)
    slot = cluster.slot(names.bucket(BUCKET))
    topology = Followed(cluster.primary_of(slot))
    moves: list[Move] = []

    def move() -> Move:
        moves.append(Move(cluster, slot))
        return moves[-1]

    yield RedisSessionStore(cast("Topology", topology), names), topology, names, move
    for each in moves:
        each.finish()


OPERATIONS: dict[str, Callable[[RedisSessionStore, NewSession], Any]] = {
    "read": lambda store, made: alive(store, made.handle),
    "write": lambda store, made: write(store, made.handle),
    "touch": lambda store, made: store.touch(made.handle, timeout=TIMEOUT),
    "rotate": lambda store, made: rotate(store, made.handle, made.secret, b"n" * 32),
    "end": lambda store, made: end(store, made.handle),
    "create": lambda store, made: create(store, "ann"),
    "end_all": lambda store, made: end_all(store, "ann"),
    "logouts": lambda store, made: last_logout(store, "ann"),
    "devices": lambda store, made: store.devices(UserId("ann"), timeout=TIMEOUT),
}


@pytest.mark.parametrize("first", ["session", "epoch", "index", "session and epoch", "session and index"])
@pytest.mark.parametrize("operation", list(OPERATIONS))
async def test_operation_while_the_keys_are_on_two_servers(
    moving: tuple[RedisSessionStore, Followed, Names, Callable[[], Move]], operation: str, first: str
) -> None:
    """Whichever keys have gone ahead: no user is signed out by it, nothing is lost, and what cannot be done
    yet is done when the slot has arrived.
    """
    store, _, names, move = moving
    made, other = await create(store, "ann"), await create(store, "ann")
    keys = {
        "session": names.session(made.handle),
        "epoch": names.epoch(BUCKET, "ann"),
        "index": names.index(BUCKET, "ann"),
    }
    slot = move()
    slot.take(*(keys[part] for part in first.split(" and ")))

    async def arrive() -> None:
        await asyncio.sleep(0.1)  # not a wait: the operation has to meet the slot on its way
        slot.finish()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(arrive())
        result = tasks.create_task(OPERATIONS[operation](store, made))
    outcome = result.result()
    if operation in ("write", "rotate"):
        assert outcome == "written"
    elif operation in ("read", "touch"):
        assert outcome
    elif operation == "devices":
        assert {device.handle for device in outcome} <= {made.handle, other.handle}
    expected = {made.handle, other.handle}
    if operation == "end":
        expected.remove(made.handle)
    elif operation == "create":
        expected.add(outcome.handle)
    elif operation == "end_all":
        expected.clear()
    assert {
        handle for handle in {made.handle, other.handle} | expected if await alive(store, handle)
    } == expected
    assert {device.handle for device in await store.devices(UserId("ann"), timeout=TIMEOUT)} == expected


async def test_revoked_session_while_its_slot_moves(
    moving: tuple[RedisSessionStore, Followed, Names, Callable[[], Move]],
) -> None:
    """An epoch that is really missing is not taken for one that is under way for longer than the slot is."""
    store, topology, names, move = moving
    made = await create(store, "ann")
    await topology.call("", "DEL", names.epoch(BUCKET, "ann"), timeout=TIMEOUT)
    assert not await alive(store, made.handle)
    assert topology.repeated == 0
    move().finish()
    assert not await alive(store, made.handle)


async def test_logout_when_the_registry_does_not_answer(
    moving: tuple[RedisSessionStore, Followed, Names, Callable[[], Move]],
) -> None:
    """On a Cluster the nodes are asked after the commit: the logout stands, and its caller has to wait for
    the lease.
    """
    store, topology, _, _ = moving
    made = await create(store, "ann")
    topology.refused = ("HKEYS",)
    ending = await end(store, made.handle)
    assert (ending.sessions, list(ending.nodes)) == (1, [UNKNOWN_NODES])
    assert list((await end_all(store, "ann")).nodes) == [UNKNOWN_NODES]
    assert not await alive(store, made.handle)
