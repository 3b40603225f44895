"""Checks of what callers pass in: the error names the argument, what it takes, and what it got."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Generic, TypeVar

__all__ = [
    "Seconds",
    "described",
    "durations",
    "expect",
    "expect_callable",
    "one_of",
    "positive",
    "seconds",
    "whole",
]

T = TypeVar("T")


class Seconds(Generic[T]):
    """The type of a dataclass field that takes a number of seconds or a ``timedelta``, and holds seconds.

    Type checkers infer both from it. At run time the dataclass only takes the default from here; its
    ``__post_init__`` calls ``seconds``.
    """

    def __init__(self, default: T) -> None:
        self._default = default

    def __get__(self, instance: object, owner: type) -> T:
        return self._default

    def __set__(self, instance: object, value: T | timedelta) -> None:
        raise AttributeError("configuration is frozen")


def seconds(name: str, value: Any) -> float:
    """A number of seconds, or a ``timedelta``, as seconds.

    Raises:
        TypeError: neither.
    """
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds or a timedelta, not {described(value)}")
    return value


def expect(name: str, value: object, *kinds: type | None, cure: str = "") -> None:
    """Raise ``TypeError`` unless ``value`` is of one of these types; a ``bool`` is no ``int``. ``None`` among
    ``kinds`` allows ``None``.
    """
    for kind in kinds:
        if value is None if kind is None else isinstance(value, kind):
            if isinstance(value, bool) and kind is not bool:
                continue
            return
    names = " or ".join("None" if kind is None else kind.__name__ for kind in kinds)
    raise TypeError(f"{name} must be {_article(names)} {names}, not {described(value)}{cure}")


def expect_callable(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` can be called, or is ``None``."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable, not {described(value)}")


def described(value: object) -> str:
    """What ``value`` is, for an error text: ``a str``, ``an int``, ``None``, ``the class itself``."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class itself: {value.__name__}"
    name = type(value).__name__
    return f"{_article(name)} {name}"


def _article(name: str) -> str:
    return "an" if name[:1].lower() in ("a", "e", "i", "o", "u") else "a"


def positive(**values: Any) -> None:
    """Raises ``TypeError``, ``ValueError`` unless each is a number above 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, not {described(value)}")
        if not value > 0:
            raise ValueError(f"{name} must be a number above 0, not {value!r}")


def whole(name: str, value: object, least: int) -> None:
    """Raises ``TypeError``, ``ValueError`` unless it is a whole number of at least ``least``."""
    expect(name, value, int)
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def durations(config: Any, *names: str, least: float | None = None) -> None:
    """Replace these fields by their seconds. ``least`` is allowed as it is; without it a duration is above 0.
    Raises ``TypeError``, ``ValueError``.
    """
    for name in names:
        given = getattr(config, name)
        value = seconds(name, given)
        if not (value > 0 if least is None else value >= least):
            bound = "above 0" if least is None else f"at least {least:g}"
            raise ValueError(f"{name} must be {bound} seconds, not {given!r}")
        object.__setattr__(config, name, value)


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ``ValueError`` unless it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
