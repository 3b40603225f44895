from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.demo.running import Demo, start_demo


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    """Three nodes, for tests that leave them running."""
    with start_demo() as running:
        yield running
