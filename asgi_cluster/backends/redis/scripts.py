"""The Lua scripts, as files of the package."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

__all__ = ["Script", "load"]


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the SHA-1 that names it in Redis (EVALSHA)."""

    name: str
    source: str
    sha: str


@cache
def load(name: str) -> Script:
    """The script in ``lua/<name>.lua``; its first line may name another for in front: ``--! other``."""
    source = _read(name)
    first, _, rest = source.partition("\n")
    if first.startswith("--! "):
        source = _read(first[4:]) + rest
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def _read(name: str) -> str:
    return (resources.files(__package__) / "lua" / f"{name}.lua").read_text(encoding="utf-8")
