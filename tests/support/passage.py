"""Which modules of the package a request or a message passes, in the order in which each is first called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, Literal

from tests.support.machine import ROOT

_PACKAGE = f"{ROOT / 'asgi_cluster'}/"


class Passage:
    """Records the calls of one flow, and of no other task of the loop.

    The flow begins where a function of the package is given ``marker``, as an argument or in a list or dict
    of them, and ends when that function returns. What it leaves to the loop or to a task meanwhile belongs to
    it: both copy the context.
    """

    def __init__(self, marker: bytes) -> None:
        self.modules: list[str] = []
        """As paths below the package."""
        self._marker = marker
        self._place: ContextVar[Literal["inside", "outside"] | None] = ContextVar("place", default=None)
        self._entry: FrameType | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """What this thread does while this is entered."""
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            self._entry = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """What this task does while this is entered is no part of the flow, whatever it is given."""
        token = self._place.set("outside")
        try:
            yield
        finally:
            self._place.reset(token)

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return
        if frame is self._entry:
            # A coroutine returns when it is suspended, and is called when it goes on.
            self._place.set("inside" if event == "call" else None)
        if event != "call":
            return
        place = self._place.get()
        if place is None and self._entry is None and any(map(self._holds, frame.f_locals.values())):
            self._entry, place = frame, "inside"
            self._place.set(place)
        module = frame.f_code.co_filename.removeprefix(_PACKAGE)
        if place == "inside" and module not in self.modules:
            self.modules.append(module)

    def _holds(self, value: Any) -> bool:
        if isinstance(value, bytes):
            return self._marker in value
        if isinstance(value, str):
            return self._marker.decode() in value
        if isinstance(value, list | tuple):
            return any(self._holds(each) for each in value)
        if isinstance(value, dict):
            return any(self._holds(each) for each in value.values())
        return False
