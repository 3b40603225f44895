"""The project's own promises: public names, documents, version. The layout is in test_layout.py."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import asgi_cluster
from asgi_cluster import Cluster, Connection, Room, Session
from tests.support.machine import ROOT

pytestmark = pytest.mark.quick

PACKAGE = ROOT / "asgi_cluster"

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
    Connection: "gone info membership outbox rooms socket",
    Room: "",
    Cluster: "",
}
"""What other modules use of them: to become less."""


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


@pytest.mark.parametrize(
    "name", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
)
def test_document_links_lead_somewhere(name: str) -> None:
    """Relative links name files of the repository."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target


def test_contributing_names_files_that_exist() -> None:
    """Where to add what: a path that moved would lead nowhere."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:asgi_cluster|tests|loadtest|\.ci)/[^`<*]*)`", text)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


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
