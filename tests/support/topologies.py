"""A real Sentinel set and a real Redis Cluster, from the same binary, on free ports."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import redis

from loadtest.ports import free_port
from tests.support.machine import LOCAL
from tests.support.servers import Server

SLOTS = 16384


def _until(what: str, condition: Callable[..., Any], *args: Any, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            if condition(*args):
                return
        except redis.RedisError:
            pass  # not up yet, or busy electing
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {what} within {timeout:g} s")
        time.sleep(0.02)


def _raw(server: Server) -> redis.Redis:
    return server.client(decode_responses=True, protocol=2)


def _in_sync(replica: redis.Redis) -> bool:
    return bool(replica.info("replication")["master_link_status"] == "up")


class _Sentinel(Server):
    def __init__(self, primary: Server, name: str, down_after: float, port: int) -> None:
        super().__init__(binary=primary.binary)
        secret = f"sentinel auth-pass {name} {primary.password}\n" if primary.password else ""
        (self.directory / "sentinel.conf").write_text(
            f"sentinel monitor {name} {LOCAL} {port} 2\n"
            f"sentinel down-after-milliseconds {name} {int(down_after * 1000)}\n"
            f"sentinel failover-timeout {name} 3000\n"
            f"{secret}"
        )

    def _command(self) -> list[str]:
        configuration = str(self.directory / "sentinel.conf")
        options = ["--sentinel", "--port", str(self.port), "--bind", LOCAL, "--dir", str(self.directory)]
        return [self.binary, configuration, *options]


@dataclass
class SentinelSet:
    """One primary, one replica, three sentinels (quorum 2)."""

    name: str
    servers: list[Server]
    """The first primary, then its replicas."""
    sentinels: list[Server]
    _stack: ExitStack = field(repr=False, default_factory=ExitStack)

    @property
    def url(self) -> str:
        secret = f":{self.servers[0].password}@" if self.servers[0].password else ""
        hosts = ",".join(f"{LOCAL}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{secret}{hosts}/{self.name}/0"

    @property
    def primary(self) -> Server:
        """Who the sentinels say it is, now."""
        for sentinel in self.sentinels:
            with _raw(sentinel) as client:
                try:
                    _, port = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)
                except redis.RedisError:
                    continue
                return next(server for server in self.servers if server.port == int(port))
        raise RuntimeError("no sentinel answers")

    def stop(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def start_sentinel_set(
    *args: str, name: str = "mymaster", down_after: float = 1.0, replicas: int = 1, binary: str | None = None
) -> SentinelSet:
    """Returns when the replica is in sync and every sentinel knows the others and the replica.

    ``args`` are options of primary and replica alike (``"--requirepass", "x"``, with ``--masterauth`` added).
    """
    with ExitStack() as stack:

        def launch(server: Server) -> Server:
            stack.callback(server.stop)
            return server.start()

        options = ["--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1", *args]
        if "--requirepass" in args:
            options += ["--masterauth", args[args.index("--requirepass") + 1]]
        primary = launch(Server(options, binary=binary))
        followers = [
            launch(Server([*options, "--replicaof", LOCAL, str(primary.port)], binary=binary))
            for _ in range(replicas)
        ]
        with primary.client() as client:
            for follower in followers:
                with follower.client() as known:
                    _until("replica in sync", _in_sync, known)
            _until("replica", lambda: client.info("replication")["connected_slaves"] == replicas)
        watched = start_sentinels(primary, followers, name=name, down_after=down_after)
        watched._stack.push(stack.pop_all())
        return watched


def start_sentinels(
    primary: Server,
    replicas: Sequence[Server],
    *,
    name: str = "mymaster",
    down_after: float = 1.0,
    port: int | None = None,
) -> SentinelSet:
    """Three sentinels around servers that run already, which stay their owner's; returns when each knows all.

    ``port``: where they find the primary, if not at its own.
    """
    with ExitStack() as stack:
        sentinels: list[Server] = []
        for _ in range(3):
            sentinel: Server = _Sentinel(primary, name, down_after, port or primary.port)
            stack.callback(sentinel.stop)
            sentinels.append(sentinel.start())

        def informed(sentinel: Server) -> bool:
            with _raw(sentinel) as client:
                fields = client.execute_command("SENTINEL", "MASTER", name)
            state = dict(zip(fields[::2], fields[1::2], strict=True))
            return int(state["num-other-sentinels"]) == 2 and int(state["num-slaves"]) == len(replicas)

        for sentinel in sentinels:
            _until("agreement of the sentinels", informed, sentinel)
        return SentinelSet(name, [primary, *replicas], sentinels, stack.pop_all())


@dataclass
class RedisCluster:
    """Three primaries with a replica each: ``nodes[0:3]`` start as primaries, ``nodes[3:6]`` as replicas."""

    nodes: list[Server]
    _stack: ExitStack = field(repr=False, default_factory=ExitStack)

    @property
    def url(self) -> str:
        secret = f":{self.nodes[0].password}@" if self.nodes[0].password else ""
        return f"redis+cluster://{secret}" + ",".join(f"{LOCAL}:{node.port}" for node in self.nodes)

    def slots(self) -> list[tuple[int, int, Server]]:
        """``(first, last, primary)`` as a living node sees it."""
        by_port = {node.port: node for node in self.nodes}
        for node in self._alive():
            with _raw(node) as client:
                try:
                    found = client.execute_command("CLUSTER", "SLOTS")
                except redis.RedisError:
                    continue
            return [(row[0], row[1], by_port[row[2][1]]) for row in found]
        raise RuntimeError("no node of the cluster answers")

    def primary_of(self, slot: int) -> Server:
        return next(node for first, last, node in self.slots() if first <= slot <= last)

    def primaries(self) -> list[Server]:
        return list(dict.fromkeys(node for _, _, node in self.slots()))

    def replica_of(self, primary: Server) -> Server:
        """A living replica of that primary."""
        with primary.client() as client:
            port = client.info("replication")["slave0"]["port"]
        return next(node for node in self.nodes if node.port == port)

    def slot(self, key: str) -> int:
        """The slot of a key, hash tags honoured."""
        with self._alive()[0].client() as client:
            return int(client.execute_command("CLUSTER", "KEYSLOT", key))

    def move(self, slots: Sequence[int], target: Server) -> None:
        """Migrate slots with their keys to another primary, one after the other, as redis-cli does."""
        with _raw(target) as at_target:
            target_id = at_target.execute_command("CLUSTER", "MYID")
            for slot in slots:
                source = self.primary_of(slot)
                if source is target:
                    continue
                with _raw(source) as at_source:
                    source_id = at_source.execute_command("CLUSTER", "MYID")
                    at_target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
                    at_source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
                    while keys := at_source.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                        at_source.execute_command(
                            "MIGRATE", LOCAL, target.port, "", 0, 5000, "REPLACE", "KEYS", *keys
                        )
                    # The target first: a slot that both disown for a moment would be nobody's.
                    at_target.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
                    at_source.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
                for node in self._alive():
                    with node.client() as client:
                        if client.info("replication")["role"] == "master":
                            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)

    def wait_ok(self, timeout: float = 20.0) -> None:
        """Until every living node says ``cluster_state:ok``."""
        for node in self._alive():
            with _raw(node) as client:
                _until("healthy cluster", _healthy, client, timeout=timeout)

    def _alive(self) -> list[Server]:
        return [node for node in self.nodes if node.process is not None and node.process.poll() is None]

    def stop(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def _healthy(client: redis.Redis) -> bool:
    return "cluster_state:ok" in client.execute_command("CLUSTER", "INFO")


def start_redis_cluster(
    *args: str, node_timeout: float = 1.0, primaries: int = 3, replicas: int = 1, binary: str | None = None
) -> RedisCluster:
    """Returns when every node says ok and every replica is in sync.

    ``node_timeout`` in seconds rules how fast a dead primary is replaced.
    """
    with ExitStack() as stack:
        nodes: list[Server] = []
        for _ in range(primaries * (1 + replicas)):
            options = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(int(node_timeout * 1000))]
            options += ["--cluster-port", str(free_port()), "--repl-diskless-sync-delay", "0"]
            options += ["--enable-debug-command", "local", *args]
            if "--requirepass" in args:
                options += ["--masterauth", args[args.index("--requirepass") + 1]]
            node = Server(options, binary=binary)
            stack.callback(node.stop)
            nodes.append(node.start())
        clients = [stack.enter_context(_raw(node)) for node in nodes]
        ids = [client.execute_command("CLUSTER", "MYID") for client in clients]
        for number, client in enumerate(clients[:primaries]):
            first, last = SLOTS * number // primaries, SLOTS * (number + 1) // primaries - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in nodes[1:]:
            bus = node.args[node.args.index("--cluster-port") + 1]
            clients[0].execute_command("CLUSTER", "MEET", LOCAL, node.port, bus)
        for number, client in enumerate(clients[primaries:]):
            _until("primary for each replica", _replicate, client, ids[number % primaries])
        for client in clients[primaries:]:
            _until("replica in sync", _in_sync, client)
        cluster = RedisCluster(nodes)
        cluster.wait_ok()
        for client in clients:
            _until("cluster that knows its members", _complete, client, len(nodes), primaries)
        cluster._stack = stack.pop_all()
        return cluster


def _replicate(client: redis.Redis, primary_id: str) -> bool:
    client.execute_command("CLUSTER", "REPLICATE", primary_id)  # an error until gossip brought the primary
    return True


def _complete(client: redis.Redis, members: int, primaries: int) -> bool:
    lines = [line.split() for line in client.execute_command("CLUSTER", "NODES").splitlines()]
    roles = [fields[2] for fields in lines if fields[7] == "connected" and "handshake" not in fields[2]]
    return len(roles) == members and sum("master" in role for role in roles) == primaries
