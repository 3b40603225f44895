"""The project's own promises: public names, the direction of imports, documents, version."""

from __future__ import annotations

import ast
import graphlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import asgi_cluster
from asgi_cluster import Cluster, Connection, Room, Session
from tests.support.machine import ROOT

PACKAGE = ROOT / "asgi_cluster"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

PUBLIC = """
    Cluster ClusterMiddleware get_session
    SessionConfig CookieConfig CacheConfig RealtimeConfig RoomRule RoomRequest ConnectRequest
    Session SessionEnded SessionInfo Connection Room RemoteUser RemoteSession
    Publication LogoutReceipt ClusterStats NodeInfo
    Connected Position RoomHistory RoomMember CloseCode
    CacheStats BusStats RealtimeStats
    ClusterError NotStarted StoreUnavailable BusUnavailable SessionConflict NotPermitted TokenExpired
"""

ATTRIBUTES: dict[type, str] = {
    Session: """
        accessed modified mark_accessed mark_modified handle user_id is_new version created_at expires_at
        login rotate logout save reload lock ended
    """,
    Connection: "id user_id session cluster join leave send close",
    Room: "name broadcast history presence disconnect",
    Cluster: "user session room accept drain stats nodes ready started draining node loop",
}
"""What an app uses of these classes. Another name here is a promise."""

INTERNALS: dict[type, str] = {
    Session: """
        replace service unsaved work
    """,
    Connection: "gone outbox rooms service socket",
    Room: "",
    Cluster: "",
}
"""What other modules use of them: to become less."""

LEAVES = {"arguments", "ids", "codes", "exceptions", "tasks", "scope", "config", "node"}
"""Known to everybody; they know at most each other."""
PORTS = {"sessions.store", "sessions.corrupt", "rooms.history", "rooms.presence"}
"""With all of ``bus``, what the halves and the backends meet at."""
COMPOSERS = {"cluster", "dispatch", "remote", "stats", "supervisor", "workers"}
REALTIME = {"sockets", "rooms", "centrifuge"}


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(), filename=str(MODULES[module]))


def imported(node: ast.AST) -> Iterator[str]:
    """Absolute names of what is imported at run time, functions included."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.orelse:
            yield from imported(child)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        assert node.module is not None
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield whole if whole in MODULES else node.module
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def allowed(module: str, other: str) -> bool:
    """Whether ``module`` may import ``other``; both without the package's name."""
    if other in LEAVES or other.startswith("bus."):
        return module not in LEAVES or other in LEAVES or (module, other) == ("node", "bus.lease")
    area = module.split(".")[0]
    if area in REALTIME:
        return other.split(".")[0] in REALTIME
    if module == "sessions.revalidation":
        return other.split(".")[0] in ("sessions", "sockets")
    if area == "sessions":
        return other.split(".")[0] == area
    if area == "backends":
        if module == "backends.choose":
            return other.startswith("backends.")
        own = ".".join(module.split(".")[:2]) + "."
        return other in PORTS or other == "backends.port" or other.startswith(own)
    return module in COMPOSERS or area == "asgi" or module == ""


def calls(module: str) -> Iterator[tuple[str, str, int]]:
    """``(receiver, name, line)`` of every call."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield ast.unparse(node.func.value), node.func.attr, node.lineno
            elif isinstance(node.func, ast.Name):
                yield "", node.func.id, node.lineno


def test_exports_are_the_documented_ones() -> None:
    """Nothing more, nothing less, sorted, and all of them there."""
    assert asgi_cluster.__all__ == sorted(PUBLIC.split())
    assert all(getattr(asgi_cluster, name).__module__.startswith("asgi_cluster.") for name in PUBLIC.split())


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_public_attributes_are_the_documented_ones(kind: type) -> None:
    """A name without underscore is found by completion, and used: none gets there by accident."""
    names = {*dir(kind), *(vars(Cluster("memory://")) if kind is Cluster else ())}
    inherited = set(dir(dict)) if issubclass(kind, dict) else set()
    public = {name for name in names - inherited if not name.startswith("_")}
    assert public == {*ATTRIBUTES[kind].split(), *INTERNALS[kind].split()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    """Halves know ports, backends implement them, the cluster composes; nobody imports the package's root."""
    here = module.removeprefix("asgi_cluster").removeprefix(".")
    for name in imported(tree(module)):
        if name.split(".")[0] == "redis":
            assert here.startswith("backends.redis"), f"{module} imports redis"
        if name.split(".")[0] != "asgi_cluster":
            continue
        assert name != "asgi_cluster", f"{module} imports the package's root"
        other = name.removeprefix("asgi_cluster.")
        assert allowed(here, other), f"{module} must not import {name}"


def test_imports_make_no_circle() -> None:
    """Not even through a function's body."""
    graph = {
        module: {name for name in imported(tree(module)) if name in MODULES and name != module}
        for module in MODULES
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_source_keeps_to_the_rules_that_were_paid_for(module: str) -> None:
    """No redis-py PubSub (it spins), no task without a group, no unbounded queue, no swallowed exception."""
    for receiver, name, line in calls(module):
        where = f"{MODULES[module].name}:{line}"
        assert name not in ("pubsub", "ensure_future"), f"{where}: {name}"
        if name == "create_task" and ("loop" in receiver or receiver in ("", "asyncio")):
            # The supervisor owns the group of all the others, and a start that a request makes begins it.
            assert module in ("asgi_cluster.supervisor", "asgi_cluster.asgi.first_request"), (
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
    bare = [
        call for call in calls("asgi_cluster.supervisor") if call[1] == "create_task" and "loop" in call[0]
    ]
    assert len(bare) == 1


# Documents


def blocks(language: str) -> list[str]:
    readme = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def example(position: int) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(blocks("python")[position], f"README.md example {position + 1}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASGI_CLUSTER_URL", raising=False)


@pytest.mark.parametrize("position", range(len(blocks("python"))))
def test_readme_example_runs(position: int) -> None:
    """Each one as it stands, its assertions included."""
    assert example(position)


def test_readme_app_does_what_its_comments_say() -> None:
    """Login, a visit counted, a message to a socket, and a logout that closes it."""
    with TestClient(example(0)["app"], base_url="https://testserver") as client:
        assert client.post("/login").json() == {"hello": "ada"}
        assert client.post("/visit").json() == {"visits": 1}
        assert client.post("/visit").json() == {"visits": 2}
        with client.websocket_connect("wss://testserver/chat") as socket:
            assert client.post("/publish", json={"text": "hi"}).json() == {"ok": True}
            assert socket.receive_json() == {"text": "hi"}
            assert client.post("/logout").json() == {"sockets_closed": 1}
            assert socket.receive() == {"type": "websocket.close", "code": 4501, "reason": "logged out"}
        assert client.post("/visit").json() == {"visits": 1}


def test_readme_names_the_commands_that_exist() -> None:
    """Demo, tests and load test are one command each, and the package behind each is there."""
    readme = (ROOT / "README.md").read_text()
    for command in ("uv run python -m demo", "uv run pytest", "uv run --group loadtest python -m loadtest"):
        assert command in readme
    assert (ROOT / "demo/__main__.py").exists()
    assert (ROOT / "loadtest/__main__.py").exists()


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"])
def test_document_links_lead_somewhere(name: str) -> None:
    """Relative links name files of the repository."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target


def test_version_is_one() -> None:
    """pyproject.toml, the package and the newest entry of the changelog agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert project["version"] == asgi_cluster.__version__ == newest[1]


def test_repository_names_no_machine() -> None:
    """No home directory, no absolute workspace path in what is distributed. Needs no git."""
    places = ["/" + place + "/" for place in ("root", "work", "home")]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    for top in (".ci", "pyproject.toml", *settings["hatch"]["build"]["targets"]["sdist"]["include"]):
        for path in (ROOT / top, *(ROOT / top).rglob("*")):
            if not path.is_file() or "__pycache__" in path.parts or path.suffix in (".png", ".ico"):
                continue
            text = path.read_text(errors="replace")
            found = [place for place in places if place in text]
            assert not found, f"{path.relative_to(ROOT)} names {found}"


def test_package_data_is_in_the_tree() -> None:
    """What the wheel has to carry besides Python."""
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "centrifuge/js/client.js").exists()
    assert list(Path(PACKAGE / "backends/redis/lua").glob("*.lua"))
