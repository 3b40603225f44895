"""Random interleavings of one visitor's requests on several nodes that share one store, with stalls of the
bus and of the store: no acknowledged write is lost, no ended session is served, and no session is left that
no client has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from asgi_cluster.ids import new_token
from tests.model.visitors import Asked, Visitor, acknowledgements_at_once
from tests.sessions.app import nodes

NODES = 3

keys = st.sampled_from(["a", "b"])
actions = st.one_of(
    st.tuples(st.sampled_from(["set", "set_same", "remove"]), keys),
    st.tuples(st.sampled_from(["append", "append", "save"])),
    st.tuples(st.just("remove"), st.just("l")),
    st.tuples(st.just("login"), st.sampled_from(["ann", "ann", "bob"])),
    st.tuples(st.sampled_from(["save", "rotate", "logout", "clear"])),
)
requests = st.builds(
    Asked,
    node=st.integers(0, NODES - 1),
    actions=st.lists(actions, max_size=4),
    stubborn=st.booleans(),
    late=st.sampled_from([False, False, False, True]),
)
waves = st.tuples(
    st.lists(requests, min_size=1, max_size=3),
    st.lists(st.integers(0, 2), max_size=25),
    st.one_of(st.just(()), st.lists(st.integers(0, NODES - 1), max_size=2)),
)
faults: st.SearchStrategy[list[str]] = st.one_of(
    st.just([]), st.lists(st.sampled_from(["", "", "", "refused", "lost", "unanswered"]), max_size=12)
)
plans = st.lists(waves, min_size=1, max_size=4)
Plan = Sequence[tuple[Sequence[Asked], Sequence[int], Sequence[int]]]


async def visit(url: str, plan: Plan, faults: Sequence[str], *, exact: bool) -> None:
    prefix = f"t{new_token()}"
    with acknowledgements_at_once():
        async with nodes(url.format(prefix=prefix), NODES, prefix=prefix) as clusters:
            visitor = Visitor(clusters, exact=exact)
            # A session to work on, whose value every node has cached.
            await visitor.together([Asked(0, [("set", "a"), ("append",)], False)], [])
            await visitor.together([Asked(node, [], False) for node in range(NODES)], [])
            visitor.faults += faults
            for requests, order, deaf in plan:
                await visitor.together(requests, order, deaf)
            await visitor.finish()
            await visitor.check()


def alone(node: int, *actions: tuple[str, ...], deaf: Sequence[int] = (), **options: bool) -> Any:
    """One request."""
    return [Asked(node, actions, **{"stubborn": False, **options})], [], deaf


def two(first: Asked, second: Asked, order: Sequence[int]) -> Any:
    """Two requests in parallel."""
    return [first, second], order, ()


@settings(max_examples=150, deadline=None)
@given(plan=plans, faults=faults)
@example(plan=[alone(1, ("set", "a"), deaf=[2]), alone(2, ("set_same", "a"), deaf=[2])], faults=[])
@example(plan=[alone(1, ("set", "a"), deaf=[2]), alone(2, ("login", "ann"), deaf=[2])], faults=[])
@example(
    plan=[
        alone(1, ("set", "a"), deaf=[2]),
        alone(2, ("set_same", "a"), ("save",), deaf=[2], stubborn=True),
    ],
    faults=["", "lost"],
)
@example(plan=[alone(0, ("append",), ("login", "ann"), ("append",))], faults=[])
@example(plan=[alone(0, ("clear",), ("save",), ("save",), stubborn=True)], faults=["lost"])
@example(plan=[alone(0, ("logout",)), alone(1, late=True)], faults=[])
@example(plan=[alone(0, ("login", "ann"))], faults=["unanswered"])
@example(plan=[alone(0, ("login", "ann"))], faults=["", "lost"])
@example(
    plan=[
        two(
            Asked(0, [("remove", "a"), ("remove", "l")], False),
            Asked(1, [("set", "b")], False),
            [0, 0, 1, 1, 1, 1, 1],
        )
    ],
    faults=[],
)
def test_requests_of_a_visitor(plan: Plan, faults: Sequence[str]) -> None:
    """In memory: every order of every step."""
    asyncio.run(visit("memory://{prefix}", plan, faults, exact=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans, faults=faults)
def test_requests_of_a_visitor_on_a_server(redis_url: str, plan: Plan, faults: Sequence[str]) -> None:
    """The same with a real server, as far as its replies let it."""
    asyncio.run(visit(redis_url, plan, faults, exact=False))
