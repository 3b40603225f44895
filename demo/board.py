"""The state of the board: a Redis hash beside the cluster's keys, changed by one script."""

from __future__ import annotations

import json
import secrets
from importlib.resources import files
from typing import Any, Literal

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

__all__ = ["COLOURS", "LONGEST_TEXT", "MOST_NOTES", "Board", "BoardUnavailable", "Refused", "checked_fields"]

COLOURS = ("lemon", "mint", "sky", "rose", "lilac", "peach")
LONGEST_TEXT = 500
MOST_NOTES = 200

_SCRIPT = files("demo").joinpath("board.lua").read_text()
_FIELDS = {"text", "x", "y", "colour"}

Note = dict[str, Any]


class BoardUnavailable(Exception):
    """Redis did not answer in time, or refused."""


class Refused(Exception):
    """A change that is not possible; ``status`` is the HTTP status of the response."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(status, reason)

    def __str__(self) -> str:
        return self.reason


class Board:
    """One shared board. ``url`` is a single Redis server: ``redis://``, ``rediss://`` or ``unix://``."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self._key = f"asgi-cluster-demo:board:{name}"
        # No retries: a change that was sent twice would be two versions.
        self._redis: Redis = Redis.from_url(
            url,
            protocol=3,
            socket_timeout=2.0,
            socket_connect_timeout=2.0,
            retry=Retry(NoBackoff(), 0),
            # With them on, the pool hands out connections that the server has closed.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        self._apply = self._redis.register_script(_SCRIPT)

    async def read(self) -> tuple[int, list[Note]]:
        """The board's version and its notes, the oldest first.

        Raises:
            BoardUnavailable: Redis did not answer.
        """
        try:
            stored: dict[Any, Any] = await self._redis.hgetall(self._key)
        except (RedisError, OSError) as error:
            raise BoardUnavailable(type(error).__name__) from error
        version = int(stored.pop(b"@version", b"0"))
        notes: list[Note] = [json.loads(note) for note in stored.values()]
        return version, sorted(notes, key=lambda note: int(note["version"]))

    async def add(self, fields: dict[str, Any], *, by: str) -> Note:
        """Add a note.

        Raises:
            Refused: the board is full.
            BoardUnavailable: Redis did not answer.
        """
        note = {"text": "", "x": 0.5, "y": 0.5, "colour": COLOURS[0], **fields, "by": by}
        return await self._change("add", secrets.token_urlsafe(9), note)

    async def edit(self, note_id: str, fields: dict[str, Any], *, by: str) -> Note:
        """Change some fields; the others keep the values that other visitors have given them.

        Raises:
            Refused: there is no such note.
            BoardUnavailable: Redis did not answer.
        """
        return await self._change("edit", note_id, {**fields, "edited_by": by})

    async def delete(self, note_id: str) -> Note:
        """Remove a note; returns its id and the board's new version. Raises as ``edit``."""
        return await self._change("delete", note_id, {})

    async def _change(
        self, action: Literal["add", "edit", "delete"], note_id: str, fields: dict[str, Any]
    ) -> Note:
        try:
            answer = await self._apply(
                keys=[self._key], args=[action, note_id, json.dumps(fields), MOST_NOTES]
            )
        except (RedisError, OSError) as error:
            raise BoardUnavailable(type(error).__name__) from error
        outcome = answer[0]
        if outcome == b"gone":
            raise Refused(404, "This note has been removed.")
        if outcome == b"full":
            raise Refused(409, f"The board is full: {MOST_NOTES} notes.")
        if outcome != b"ok":
            raise Refused(409, "A note with this id exists already.")
        note: Note = json.loads(answer[1])
        return note

    async def close(self) -> None:
        await self._redis.aclose()


def checked_fields(given: Any) -> dict[str, Any]:
    """The fields of a note that a visitor may set.

    Raises:
        Refused: a field is unknown, or its value is not allowed.
    """
    if not isinstance(given, dict) or not given.keys() <= _FIELDS:
        raise Refused(422, f"A note has the fields {', '.join(sorted(_FIELDS))}.")
    if "text" in given:
        text = given["text"]
        if (
            not isinstance(text, str)
            or len(text) > LONGEST_TEXT
            or any("\ud800" <= c <= "\udfff" for c in text)
        ):
            raise Refused(422, f"The text of a note has at most {LONGEST_TEXT} characters.")
    for axis in ("x", "y"):
        value = given.get(axis, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise Refused(422, f"{axis} is a number from 0 to 1.")
    if given.get("colour", COLOURS[0]) not in COLOURS:
        raise Refused(422, f"The colour is one of {', '.join(COLOURS)}.")
    return given
