"""Tests wait for events, not for time. Here are those that sleep all the same, each with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.machine import ROOT

pytestmark = pytest.mark.quick

WORK = "work at a pace: the pause is part of the load"
NOTHING = "shows what does not happen: there is no event, and nothing that could be sent as a sentinel"
POLLS = "polls what has no event"

REASONS = {
    "bus/faults.py::_scenario": WORK,
    "bus/faults.py::lasts": "how long a fault lasts",
    "bus/partition.py::partition": WORK,
    "bus/test_minority.py::test_primary_that_its_peers_replaced": NOTHING,
    "bus/test_outages.py::test_no_lease_before_every_subscription_is_acknowledged": NOTHING,
    "bus/test_registry.py::test_registration_lost_in_a_blocked_loop": "blocks the event loop: its subject",
    "bus/traffic.py::Health": WORK,
    "bus/traffic.py::Traffic": WORK,
    "contract/test_moving_slot.py::Followed": "the pause before a command is repeated, as in the package",
    "contract/test_moving_slot.py::test_operation_while_the_keys_are_on_two_servers": (
        "the operation has to meet the slot on its way"
    ),
    "demo/running.py::start_demo": POLLS,
    "draining/test_drain.py::Reader": "the pause before a reconnect, as in a client",
    "draining/test_drain.py::test_rolling_restart_loses_nothing_in_a_room_with_history": WORK,
    "realtime/follower.py::Follower": "the pause before a reconnect, as in a client",
    "realtime/test_connection.py::handler": WORK,
    "realtime/test_connection.py::test_slow_body_loses_nothing": "a slow handler: its subject",
    "realtime/test_killed_presence.py::measure": "kills at different moments of the heartbeat",
    "realtime/test_tls.py::test_closing_leaves_no_traceback": NOTHING,
    "sessions/test_lasting_cookies.py::test_cookie_is_renewed_once_per_tenth": WORK,
    "sessions/test_live_logout.py::Place": WORK,
    "sessions/test_live_logout.py::test_client_that_never_reads_is_cut_off": (
        "until every buffer on the way is full, the kernel's too"
    ),
    "sessions/test_recorded_history.py::record": WORK,
    "sessions/test_security.py::test_idle_session_ends_and_a_used_one_does_not": (
        "to look at the idle session would use it"
    ),
    "support/proxy.py::Link": "the delay of a slow line",
    "support/servers.py::Server": POLLS,
    "support/topologies.py::_until": POLLS,
    "support/waiting.py::eventually": POLLS,
}
"""By file and function."""


def sleeps() -> Iterator[tuple[str, int]]:
    """``(file::function, line)`` of every sleep outside of the fault tier that is not ``sleep(0)``."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text()
        if "sleep(" not in text:
            continue
        module = ast.parse(text)
        if any("mark.faults" in ast.unparse(node) for node in module.body if _sets_marks(node)):
            continue
        for outer in module.body:
            if any("faults" in ast.unparse(mark).lower() for mark in getattr(outer, "decorator_list", ())):
                continue
            name = f"{path.relative_to(ROOT / 'tests').as_posix()}::{getattr(outer, 'name', '')}"
            for node in ast.walk(outer):
                if (
                    isinstance(node, ast.Call)
                    and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) == "sleep"
                    and ast.unparse(node.args[0]) != "0"
                ):
                    yield name, node.lineno


def _sets_marks(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"


def test_every_sleep_has_its_reason() -> None:
    """Await an event, use ``eventually``, or pass a clock. If none of them will do, ``REASONS`` says why."""
    found = dict(sleeps())
    unexplained = [f"{name}, line {line}" for name, line in found.items() if name not in REASONS]
    assert unexplained == []
    assert set(REASONS) - set(found) == set(), "these do not sleep any more"
