"""Names of rooms."""

from __future__ import annotations

import re

__all__ = ["FORBIDDEN", "check_room"]

LONGEST = 255
"""Characters."""
FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffd]")
"""No name has one of these."""


def check_room(name: str) -> str:
    """The name, if it can be one: 1 to 255 characters, no control characters, no surrogates, no U+FFFD (what
    is left of a character that could not be decoded). Exact, case counts. Names of the package's own have
    control characters, so neither an app nor a client can name them.

    Raises:
        ValueError: it cannot.
    """
    if not isinstance(name, str):
        raise TypeError(f"a room name is a str, not {type(name).__name__}")
    if not 1 <= len(name) <= LONGEST:
        raise ValueError(f"a room name has 1 to {LONGEST} characters, not {len(name)}")
    if FORBIDDEN.search(name):
        raise ValueError(f"a room name has no control characters, line ends, surrogates or U+FFFD: {name!r}")
    return name
