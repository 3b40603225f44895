"""Fixtures of the bus tests."""

from __future__ import annotations

from typing import Any

import pytest
from redis._parsers import _AsyncHiredisParser, _AsyncRESP3Parser
from redis.asyncio.connection import AbstractConnection


@pytest.fixture(params=["RESP3", "Hiredis"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each parser of redis-py in turn: it takes hiredis where that is installed."""
    if request.param == "Hiredis":
        pytest.importorskip("hiredis")  # the run with the oldest dependencies has none
    parsers: dict[str, Any] = {"RESP3": _AsyncRESP3Parser, "Hiredis": _AsyncHiredisParser}
    set_parser = AbstractConnection.set_parser
    monkeypatch.setattr(
        AbstractConnection, "set_parser", lambda self, parser_class: set_parser(self, parsers[request.param])
    )
    return str(request.param)
