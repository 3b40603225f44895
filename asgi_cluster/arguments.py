"""Checks of what callers pass in: the error names the argument, what it takes, and what it got."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Generic, TypeVar

__all__ = ["Seconds", "described", "expect", "expect_callable", "seconds"]

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
