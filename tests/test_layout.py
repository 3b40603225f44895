"""The package's layout: which module may import which, how long modules are, and rules for their source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache

import pytest

from tests.support.machine import ROOT

pytestmark = pytest.mark.quick

PACKAGE = ROOT / "asgi_cluster"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""By their names without the package's; ``""`` is the package itself."""

AREAS = {
    "values": "arguments codes exceptions ids tasks",
    "ports": "backends.port rooms.history rooms.presence sessions.store sessions.corrupt",
    "facade": "cluster options parts remote stats workers",
}
"""Modules that are an area together. The other modules of a folder are one; any other module is its own."""

ALLOWED = {
    "values": "",
    "compat": "",
    "bus": "values",
    "node": "values bus",
    "ports": "values bus node",
    "sessions": "values bus node ports",
    "sockets": "values bus node compat",
    "config": "values rooms",  # types of the hooks that an app passes in
    "scope": "values node sessions sockets",
    "rooms": "values bus node ports config scope sessions sockets",
    "centrifuge": "values bus node ports config scope sessions sockets rooms",
    "backends.memory": "values bus node ports",
    "backends.redis": "values bus node ports compat",
    "backends": "ports backends.memory backends.redis",
    "dispatch": "values bus node sessions sockets rooms",
    "lifetime": "values node ports config sessions sockets rooms dispatch compat",
    "facade": (
        "values bus node ports config sessions sockets rooms centrifuge backends dispatch lifetime compat"
    ),
    "asgi": "values scope sessions sockets facade compat",
    "": "values bus ports config scope sessions sockets rooms facade asgi",
}
"""What the modules of an area may import beside each other, for typing and inside of functions too."""

LARGE = {
    "backends.memory.store": (300, "one store: each operation is what a script does on Redis"),
    "backends.redis.store": (355, "one store: each operation is a script's keys and arguments"),
    "backends.redis.subscribers": (
        280,
        "which channel is subscribed where, and what a change of primaries means",
    ),
    "rooms.rooms": (285, "one service: publishing, reading, presence, and what the bus brings"),
    "rooms.stream": (295, "one state machine"),
    "sessions.store": (265, "the ports of one store: half of it is docstrings"),
    "sessions.unit_of_work": (320, "one state machine"),
    "sockets.hub": (320, "one index, with the closing of what it finds"),
    "sockets.outbox": (350, "one queue, with its three ways to write"),
    "sockets.socket": (330, "one state machine: a third of it is closing"),
}
"""Modules of more than 250 lines: how long they may become, and why they are not shorter."""


def area(module: str) -> str:
    """The area of a module: its group, else the folder."""
    for name, members in AREAS.items():
        if module in members.split():
            return name
    folder, _, rest = module.partition(".")
    if folder == "backends" and "." in rest:
        return ".".join(module.split(".")[:2])
    return folder


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(), filename=str(MODULES[module]))


def imported(module: str) -> Iterator[tuple[str, str]]:
    """Absolute names of the modules that are imported, for typing and inside of functions too, and of what is
    taken from them.
    """
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole.removeprefix("asgi_cluster.") in MODULES:
                    yield whole, ""
                else:
                    yield node.module, alias.name


def graph() -> Mapping[str, set[str]]:
    """Of each module, the package's modules that it imports."""
    return {
        module: {
            name.removeprefix("asgi_cluster").removeprefix(".")
            for name, _ in imported(module)
            if name.split(".")[0] == "asgi_cluster"
        }
        for module in MODULES
    }


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of modules of which each can be reached from each other one."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            for other in edges[ahead.pop()] - seen:
                seen.add(other)
                ahead.append(other)
        reached[start] = seen
    found: list[set[str]] = []
    for module in edges:
        circle = {other for other in reached[module] if module in reached[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


def calls(module: str) -> Iterator[tuple[str, str, int]]:
    """``(receiver, name, line)`` of every call."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield ast.unparse(node.func.value), node.func.attr, node.lineno
            elif isinstance(node.func, ast.Name):
                yield "", node.func.id, node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    """As the table says: the parts import ports, the backends implement them, and parts.py composes. No
    module imports the package's root.
    """
    here = area(module)
    assert here in ALLOWED, f"a new area: say in ALLOWED what {here} may import, and who may import {here}"
    for name, _ in imported(module):
        if name.split(".")[0] == "redis":
            assert here == "backends.redis", f"{module} imports redis"
        if name.split(".")[0] != "asgi_cluster":
            continue
        assert name != "asgi_cluster", f"{module} imports the package's root"
        there = area(name.removeprefix("asgi_cluster."))
        assert there in (here, *ALLOWED[here].split()), f"{here}: {module} must not import {name}, of {there}"


def test_table_has_every_area() -> None:
    """And no module or area that is not there."""
    assert {area(module) for module in MODULES if MODULES[module].stat().st_size} == set(ALLOWED)
    assert {name for row in ALLOWED.values() for name in row.split()} <= set(ALLOWED)
    assert {name for row in AREAS.values() for name in row.split()} <= set(MODULES)


def test_imports_make_no_circle() -> None:
    """Not even for typing or through a function's body."""
    assert circles(graph()) == []


def test_circle_is_found() -> None:
    """A module that imports itself is one, too."""
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"d"}}
    assert circles(edges) == [{"b", "c"}, {"d"}]


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module: str) -> None:
    """At most 250 lines, or as many as the list says."""
    lines = len(MODULES[module].read_text().splitlines())
    most, reason = LARGE.get(module, (250, ""))
    assert lines <= most, f"{module} has {lines} lines: split it, or say in LARGE why it is longer"
    assert lines > 250 or not reason, f"{module} has {lines} lines: take it off the list"


def test_large_modules_exist() -> None:
    """The list names no other."""
    assert set(LARGE) <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_named_after_what_they_hold(module: str) -> None:
    """And say which of their names others may use."""
    assert not {"base", "common", "helpers", "manager", "misc", "utils"} & set(module.split("."))
    if MODULES[module].name != "__init__.py":
        targets = [
            target.id
            for node in tree(module).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        ]
        assert "__all__" in targets, f"{module} has no __all__"


@pytest.mark.parametrize("module", MODULES)
def test_source_keeps_to_the_rules_that_were_paid_for(module: str) -> None:
    """No redis-py PubSub (it spins), no task without a group, no unbounded queue, no swallowed exception."""
    for receiver, name, line in calls(module):
        where = f"{MODULES[module].name}:{line}"
        assert name not in ("pubsub", "ensure_future"), f"{where}: {name}"
        if name == "create_task" and ("loop" in receiver or receiver in ("", "asyncio")):
            # The supervisor owns the group of all the others, and a start that a request makes begins it.
            assert module in ("lifetime.supervisor", "lifetime.lazy_start"), (
                f"{where}: a task without a group"
            )
    for node in ast.walk(tree(module)):
        where = f"{MODULES[module].name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (silent and caught in ("", "Exception", "BaseException")), f"{where}: swallows all"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("asyncio.Queue", "Queue", "queue.Queue"):
            assert node.args or node.keywords, f"{where}: a queue without a bound"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getLogger"):
            assert re.fullmatch(r"'asgi_cluster(\.[a-z]+)?'", ast.unparse(node.args[0])), (
                f"{where}: logger name"
            )


def test_supervisor_is_the_only_task_without_a_group() -> None:
    """And there is exactly one."""
    bare = [call for call in calls("lifetime.supervisor") if call[1] == "create_task" and "loop" in call[0]]
    assert len(bare) == 1
