"""The table of combinations, row by row and backend by backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest

from tests.sessions.combinations import BACKENDS, OUTCOMES, TABLE, How, Stage, Who, described, play, staged


@pytest.fixture(scope="module", params=BACKENDS)
async def stages(request: pytest.FixtureRequest) -> AsyncIterator[dict[bool, Stage]]:
    """The nodes of one backend, for all its rows: by whether their sessions expire within a second."""
    with ExitStack() as servers:
        urls = BACKENDS[request.param](servers)
        async with staged(urls, expiring=False) as lasting, staged(urls, expiring=True) as expiring:
            yield {False: lasting, True: expiring}


@pytest.mark.parametrize(("who", "how"), OUTCOMES)
async def test_combination(stages: dict[bool, Stage], who: Who, how: How) -> None:
    """The socket closes with the code of the table or stays, the receipt is complete at once and counts
    right.
    """
    await play(stages[how == "expiry"], who, how)


def test_table_has_the_rows_of_the_suite() -> None:
    """``docs/combinations.md`` was written by this suite: same rows, same outcomes, a column for each
    backend.
    """
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TABLE.read_text().splitlines()
        if line.startswith("|")
    ]
    assert head[4:] == list(BACKENDS)
    assert [cells[:4] for cells in rows] == described()
    assert all(cell for cells in rows for cell in cells)
