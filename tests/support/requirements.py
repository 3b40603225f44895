"""Installs what the tests need when they are started, so that ``uv run python -m demo`` need not.

``uv run`` cannot install other groups for pytest than for the demo. So pytest starts itself again, as
``uv run --group test pytest``, when something of the group ``test`` in ``pyproject.toml`` is missing or has
another version. Without uv it says what to install.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.requirements import Requirement

from tests.support.machine import ROOT

__all__ = ["run_with_the_test_group"]

GROUP = os.environ.get("ASGI_CLUSTER_TEST_GROUP", "test")
"""``core`` is enough for most tests: .ci/run tries its oldest versions."""
AGAIN = "ASGI_CLUSTER_TESTS_AGAIN"


def run_with_the_test_group(pluginmanager: pytest.PytestPluginManager) -> None:
    """Return if everything is there; else replace this process by one that has it.

    Raises:
        pytest.UsageError: it cannot be installed from here.
    """
    missing = [str(each) for each in requirements(GROUP) if not satisfied(each)]
    uv = os.environ.get("UV")  # set by `uv run` for what it starts
    if not missing:
        return
    if uv is None or AGAIN in os.environ:
        raise pytest.UsageError(
            f"The tests need {', '.join(missing)}. Start them with `uv run pytest`, or install the "
            f"dependency group: pip install --group {GROUP} -e ."
        )
    # pytest captures already: give the terminal back to who comes after us.
    if (capture := pluginmanager.getplugin("capturemanager")) is not None:
        capture.suspend_global_capture(in_=True)
    as_module = os.path.basename(sys.argv[0]) == "__main__.py"
    command = ["run", "--group", GROUP, *(("python", "-m", "pytest") if as_module else ("pytest",))]
    print(f"Installing what the tests need: uv {' '.join(command)}", file=sys.stderr, flush=True)
    # In place of this process, so that signals and the exit status are those of the one that runs the tests.
    os.execve(
        uv,
        [uv, "--project", str(ROOT), *command, *sys.argv[1:]],
        {**os.environ, AGAIN: "1"},
    )


def requirements(group: str) -> Iterator[Requirement]:
    """The packages of a dependency group, those of the groups that it includes too."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    for each in groups[group]:
        if isinstance(each, dict):
            yield from requirements(each["include-group"])
        else:
            yield Requirement(each)


def satisfied(requirement: Requirement) -> bool:
    """Whether it is installed, in a version that will do. Extras are not looked at."""
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False
