"""What the parts of a node share: its name, its start and its loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest

from asgi_cluster import NotStarted
from asgi_cluster.node import Node

pytestmark = pytest.mark.quick


def node(*, needs_start: bool, attach: Callable[[], None] = lambda: None, label: str | None = "web") -> Node:
    """A node that is not started."""
    return Node(label=label, listens=True, deadline=1.0, needs_start=needs_start, attach=attach)


def test_name_is_made_at_its_first_use() -> None:
    """``label-pid-random``, and another one after each start."""
    made = node(needs_start=True)
    assert made.current_id is None
    first = made.id
    assert first.startswith(f"web-{os.getpid()}-")
    assert made.current_id == made.id == first
    assert made.renew() != first


def test_name_without_a_label_is_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the characters that a key may have."""
    monkeypatch.setattr("socket.gethostname", lambda: "büro 7")
    assert node(needs_start=True, label=None).id.startswith("b-ro-7-")


async def test_use_before_the_start_is_refused() -> None:
    """With what was tried; nothing is attached."""
    attached: list[str] = []
    made = node(needs_start=True, attach=lambda: attached.append("now"))
    with pytest.raises(NotStarted, match="broadcasting"):
        made.ensure_started("broadcasting")
    assert not attached
    assert not made.started


async def test_node_without_a_start_is_attached_at_each_use(caplog: pytest.LogCaptureFixture) -> None:
    """It may have been stopped meanwhile. The log has one line, for the developer who goes on to Redis."""
    attached: list[str] = []
    made = node(needs_start=False, attach=lambda: attached.append("now"))
    caplog.set_level("INFO")
    made.ensure_started("broadcasting")
    made.ensure_started("broadcasting")
    assert attached == ["now"] * 2
    assert caplog.text.count("with Redis that is NotStarted") == 1


@pytest.mark.parametrize("needs_start", [True, False])
async def test_started_node_belongs_to_its_loop(needs_start: bool) -> None:
    """Another loop is refused, for memory:// as for Redis: a test is to find what production would."""
    made = node(needs_start=needs_start)
    async with asyncio.TaskGroup() as tasks:
        made.tasks, made.loop = tasks, asyncio.get_running_loop()
        made.ensure_started("broadcasting")

        async def elsewhere() -> None:
            made.ensure_started("broadcasting")

        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, elsewhere())


@pytest.mark.parametrize("needs_start", [True, False])
def test_loop_that_has_ended(needs_start: bool) -> None:
    """A node on memory:// may be used on the next loop; one on Redis has its connections on the ended one."""
    made = node(needs_start=needs_start)

    async def start() -> None:
        async with asyncio.TaskGroup() as tasks:
            made.tasks, made.loop = tasks, asyncio.get_running_loop()

    async def use() -> str:
        try:
            made.ensure_started("broadcasting")
        except RuntimeError:
            return "refused"
        return "used"

    asyncio.run(start())
    assert asyncio.run(use()) == ("refused" if needs_start else "used")
