"""Every interleaving of a few reads, writes, beats and breaks, on the real cache and the real lease; and
thousands of random ones.

What must never happen: a hit that is staler than the lease, and a request that reads something older than
a write that its own node had received. Without any one of the guards that must happen: otherwise these tests
prove nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asgi_cluster.bus.lease import Heartbeats
from asgi_cluster.ids import Handle
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.entry import Entry, PendingRead
from tests.model.world import HANDLE, LEASE, Node, StaleRead, World

# The guards, each removed


class FillsAnyway(SessionCache):
    def _may_keep(self, flight: PendingRead) -> bool:
        return True


class KeepsOnGap(SessionCache):
    def flush(self, buckets: frozenset[int] | None = None) -> None:
        pass


class NeverDetaches(SessionCache):
    def _detach(self, handle: Handle) -> None:
        pass


class IgnoresLease(SessionCache):
    def get(self, handle: Handle) -> Entry | None:
        return self._entries.get(handle)

    def _may_keep(self, flight: PendingRead) -> bool:
        return flight.attached


class CountsEveryBeat(Heartbeats):
    def beat(self) -> None:
        self._beats.append((self.lease.clock(), True))

    def gap(self) -> None:
        self._beats.clear()


class CountsRedirects(Heartbeats):
    def reply(self, renewed: bool) -> None:
        super().reply(True)


def world_with(
    cache: type[SessionCache] = SessionCache, echo: type[Heartbeats] = Heartbeats
) -> Callable[[], World]:
    return lambda: World(1, cache, echo)


def without_drop(which: str) -> Callable[[], World]:
    def make() -> World:
        world = World(1)
        setattr(world.nodes[0], which, False)
        return world

    return make


def redirecting(echo: type[Heartbeats]) -> Callable[[], World]:
    """The slot moves: the connection stands, the beats are answered with MOVED, and nothing is pushed any
    more.
    """

    def make() -> World:
        world = World(1, SessionCache, echo)
        node = world.nodes[0]

        def server_takes() -> None:
            if node.to_server.popleft() == "subscribe":
                world.server.links.append(node)
                node.from_server.append("subscribed")
            else:
                node.from_server.append("redirect" if world.lossy else "echo")

        node.server_takes = server_takes  # type: ignore[method-assign]
        return world

    return make


def lossy() -> World:
    """A link between servers loses messages while every TCP connection stays up and the echo goes on."""
    world = World(1)
    world.lossy = True
    return world


# The explorer

_BUDGET = {
    "get": 3,
    "disconnect": 1,
    "beat": 1,
    "connect": 1,
    "begin_write": 1,
    "external": 1,
    "wait": 1,
    "move": 0,
}


def trusted(world: World) -> World:
    """Past the first subscribe and the first echo, so that the explorer spends its depth on what matters."""
    node = world.nodes[0]
    node.connect()
    node.server_takes()
    node.receive()
    node.beat()
    node.server_takes()
    node.receive()
    assert node.lease.live or world.lossy
    return world


def explore(make: Callable[[], World], *, depth: int, budget: Mapping[str, int] = _BUDGET) -> int:
    """Run every sequence of at most ``depth`` actions; returns how many there were. Raises ``StaleRead``."""
    count = 0
    stack: list[tuple[tuple[str, object], ...]] = [()]
    while stack:
        path = stack.pop()
        world = trusted(make())
        node = world.nodes[0]
        for name, argument in path:
            perform(world, node, name, argument)
        count += 1
        if len(path) == depth:
            continue
        used = [name for name, _ in path]
        options = [*world.actions(node), ("external", None), ("wait", None), ("move", None)]
        for name, argument in options:
            if used.count(name) < budget.get(name, depth):
                stack.append((*path, (name, argument)))
    return count


def perform(world: World, node: Node, name: str, argument: object) -> None:
    match name:
        case "external":
            world.server.write()
        case "wait":
            world.now += LEASE * 1.01
        case "move":
            world.lossy = True
        case _:
            world.do(node, name, argument)


_WEIGHTS = {
    "disconnect": 0.15,
    "connect": 3.0,
    "server_takes": 3.0,
    "receive": 3.0,
    "external": 0.5,
    "begin_write": 0.3,
}


def wander(make: Callable[[], World], *, seed: int, steps: int = 120) -> None:
    """One random timed run. Raises ``StaleRead``."""
    rng = random.Random(seed)
    world = trusted(make())
    node = world.nodes[0]
    stalled_until = 0.0
    for _ in range(steps):
        world.now += rng.choice([0.0, 0.0, 0.01, 0.1, 0.4])
        options = [*world.actions(node), ("external", None)]
        if rng.random() < 0.02:
            stalled_until = world.now + rng.uniform(0, 3 * LEASE)
        if world.now < stalled_until:
            # The server has stopped, or the link swallows everything: nothing moves on the connection, and
            # TCP stands.
            options = [o for o in options if o[0] not in ("server_takes", "receive", "disconnect")]
        weights = [_WEIGHTS.get(name, 1.0) for name, _ in options]
        name, argument = rng.choices(options, weights)[0]
        perform(world, node, name, argument)


def test_cache_never_breaks_the_bound_in_any_short_interleaving() -> None:
    """All sequences of six actions after the first echo: no stale hit, no read older than an acknowledged
    write.
    """
    assert explore(world_with(), depth=6) > 10_000


def test_cache_never_breaks_the_bound_in_random_timed_runs() -> None:
    """Silent stalls, breaks and delays in 3000 random runs: none breaks the bound."""
    for seed in range(3000):
        wander(world_with(), seed=seed)


REMOVED = {
    "fill guard": world_with(FillsAnyway),
    "gap flush": world_with(KeepsOnGap),
    "flight detach": world_with(NeverDetaches),
    "lease check": world_with(IgnoresLease),
    "echo from before the subscribe-ack": world_with(echo=CountsEveryBeat),
    "drop before a local write": without_drop("drops_before_write"),
    "drop after a local write": without_drop("drops_after_write"),
    "link that stays up and loses": lossy,
}


@pytest.mark.parametrize("guard", REMOVED)
def test_removing_a_guard_breaks_the_bound(guard: str) -> None:
    """Without this guard some random run reads something too old: so the guard is needed, and the runs would
    notice.
    """

    def search() -> None:
        for seed in range(6000):
            wander(REMOVED[guard], seed=seed)

    with pytest.raises(StaleRead):
        search()


def test_redirected_echo_counted_breaks_the_bound() -> None:
    """A beat that was answered by a redirect proves nothing: counted, it keeps the cache alive of a node that
    receives nothing.
    """

    def run(echo: type[Heartbeats]) -> None:
        world = trusted(redirecting(echo)())
        node = world.nodes[0]
        node.get()
        node.store_answers(node.reads[0])
        node.land(node.reads[0])
        world.lossy = True
        world.server.write()
        for _ in range(8):
            world.now += 0.5
            node.beat()
            node.server_takes()
            node.receive()
            node.get()

    run(Heartbeats)
    with pytest.raises(StaleRead):
        run(CountsRedirects)


class CacheMachine(RuleBasedStateMachine):
    """Hypothesis drives two nodes, and shrinks what it finds."""

    cache: type[SessionCache] = SessionCache
    echo: type[Heartbeats] = Heartbeats

    @initialize()
    def start(self) -> None:
        self.world = World(2, self.cache, self.echo)
        for node in self.world.nodes:
            node.connect()

    @rule(which=st.integers(0, 1), choice=st.integers(0, 30))
    def act(self, which: int, choice: int) -> None:
        node = self.world.nodes[which]
        actions = self.world.actions(node)
        self.world.do(node, *actions[choice % len(actions)])

    @rule(which=st.integers(0, 1))
    def move_everything(self, which: int) -> None:
        node = self.world.nodes[which]
        while node.to_server:
            node.server_takes()
        while node.from_server:
            node.receive()

    @rule(seconds=st.sampled_from([0.01, 0.3, 0.5, 1.0, 2.1]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds

    @rule()
    def write(self) -> None:
        self.world.server.write()

    @precondition(lambda self: any(node.reads for node in self.world.nodes))
    @rule()
    def finish_reads(self) -> None:
        for node in self.world.nodes:
            for read in list(node.reads):
                if read.answer is None:
                    node.store_answers(read)
                node.land(read)

    @rule(which=st.integers(0, 1))
    def fill(self, which: int) -> None:
        self.world.nodes[which].get()


_MACHINE = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_two_nodes_under_a_state_machine() -> None:
    """Hypothesis finds no sequence that breaks the bound on two nodes."""
    run_state_machine_as_test(CacheMachine, settings=_MACHINE)


def test_handle_of_the_model_is_a_real_one() -> None:
    """The model reads through the same bucket arithmetic as the package."""
    assert int(HANDLE[:2], 16) == 0
