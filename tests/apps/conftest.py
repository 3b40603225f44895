"""Every framework in turn."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.apps.kit import MakeApp

FRAMEWORKS = {
    "plain": "plain:make_app",
    "starlette": "starlette_app:make_app",
    "fastapi": "fastapi_app:make_app",
    "litestar": "litestar_app:make_app",
    "quart": "quart_app:make_app",
    "django": "django_app:make_app",
    "channels": "django_app:make_channels_app",
}


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_app(framework: str) -> MakeApp:
    module, name = FRAMEWORKS[framework].split(":")
    found: MakeApp = getattr(import_module(f"tests.apps.{module}"), name)
    return found


@pytest.fixture
def scope_key(framework: str) -> str | None:
    """Django and Channels keep their own hands on ``session``."""
    return None if framework in ("django", "channels") else "session"
