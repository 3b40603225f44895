"""A start that fails is said to the server, whatever the reason: it stops instead of serving errors."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import pytest
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_cluster import Cluster, ClusterMiddleware
from tests.support.nodes import serve


async def visit(request: Request) -> JSONResponse:
    request.session["visits"] = 1
    return JSONResponse(1)


def wrapped(cluster: Cluster) -> ClusterMiddleware:
    return ClusterMiddleware(Starlette(routes=[Route("/visit", visit)]), cluster)


@pytest.mark.parametrize("lifespan", ["on", "auto"])
async def test_error_that_is_none_of_ours(
    lifespan: str,
    redis_url: str,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """uvicorn ends, with ``lifespan="auto"`` too, and the log has the reason and where it comes from."""
    cluster = Cluster(redis_url, prefix=prefix)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(cluster._parts.backend, "open", fail)
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="refused to start"), flatten_subgroups=True):
        async with serve(wrapped(cluster), lifespan=lifespan):
            pytest.fail("it started")
    assert "the cluster could not be started: inside" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert "appears unsupported" not in caplog.text


@pytest.mark.quick
@pytest.mark.parametrize("url", ["memory://", "redis://127.0.0.1:1"])
def test_trio_is_refused_in_lifespan(url: str, prefix: str) -> None:
    """By its name, and not by advice to turn on the lifespan that is on."""
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "lifespan.startup"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    trio.run(wrapped(Cluster(url, prefix=prefix)), {"type": "lifespan"}, receive, send)
    (answer,) = sent
    assert answer["type"] == "lifespan.startup.failed"
    assert "trio is not supported" in answer["message"]


@pytest.mark.quick
@pytest.mark.parametrize("url", ["memory://", "redis://127.0.0.1:1"])
def test_trio_is_refused_in_a_request(url: str, prefix: str) -> None:
    """Without lifespan as well."""
    client = TestClient(wrapped(Cluster(url, prefix=prefix)), backend="trio", base_url="https://test")
    with pytest.raises(RuntimeError, match="trio is not supported"):
        client.get("/visit")
    with pytest.raises(RuntimeError, match="trio is not supported"), client.websocket_connect("/ws"):
        pytest.fail("it was accepted")
