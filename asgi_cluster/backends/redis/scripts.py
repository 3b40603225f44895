"""The Lua scripts, as files of the package."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

__all__ = ["Script", "load"]


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the SHA-1 by which Redis knows it (EVALSHA)."""

    name: str
    source: str
    sha: str


@cache
def load(name: str) -> Script:
    """The script in ``scripts/<name>.lua``."""
    source = (resources.files(__package__) / "scripts" / f"{name}.lua").read_text(encoding="utf-8")
    return Script(name, source, hashlib.sha1(source.encode()).hexdigest())
