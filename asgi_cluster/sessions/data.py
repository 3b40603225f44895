"""A dict that notes whether it was read and whether it was changed, as Starlette 1.x's sessions do."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Set, ValuesView
from datetime import datetime
from typing import Any

from asgi_cluster.sessions.codec import encode_value

__all__ = ["SessionData"]

_MISSING: Any = object()
_UNCHANGEABLE = frozenset({type(None), bool, int, float, str, bytes, datetime})
"""By exact type: of any other value, a tuple with a list inside for example, the app may change a part."""


class SessionData(dict[str, Any]):
    """The mapping half of a session.

    ``accessed`` and ``modified`` are Starlette's flags. Every look at it goes through ``mark_accessed`` and
    every change through ``mark_modified``, which raise when the store is unavailable or the response has
    started.
    """

    accessed: bool = False
    modified: bool = False
    exposed: bool = False
    """Whether the app may hold a value that can be changed in place: one that it read, or assigned."""
    touched: Set[str] = frozenset()
    """The keys that the app assigned or removed since the last save. They are sent even when the record that
    was read shows the same: the store may have another value by now.
    """

    def mark_accessed(self) -> None:
        """The app looks at the session: the response depends on the cookie."""
        self.accessed = True

    def mark_modified(self) -> None:
        """The app changes the session."""
        self.mark_accessed()
        self.modified = True

    def _touch(self, keys: Iterable[str]) -> None:
        touched = self.touched
        if not isinstance(touched, set):
            touched = self.touched = set()
        touched.update(keys)

    def _held_by_app(self, key: str) -> bool:
        """Whether the app may hold the value of ``key``, and change it in place."""
        return self.exposed and type(super().get(key)) not in _UNCHANGEABLE

    # Reading

    def __getitem__(self, key: str) -> Any:
        self.mark_accessed()
        value = super().__getitem__(key)
        if type(value) not in _UNCHANGEABLE:
            self.exposed = True
        return value

    def get(self, key: str, default: Any = None) -> Any:
        self.mark_accessed()
        value = super().get(key, default)
        if type(value) not in _UNCHANGEABLE:
            self.exposed = True
        return value

    def __contains__(self, key: object) -> bool:
        self.mark_accessed()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.mark_accessed()
        return super().__iter__()

    def __len__(self) -> int:
        self.mark_accessed()
        return super().__len__()

    def __bool__(self) -> bool:
        return len(self) > 0

    def __eq__(self, other: object) -> bool:
        self.mark_accessed()
        return super().__eq__(other)

    __hash__ = None

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        self.mark_accessed()
        return super().keys()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self.mark_accessed()
        self.exposed = True
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self.mark_accessed()
        self.exposed = True
        return super().items()

    def copy(self) -> dict[str, Any]:
        """A plain dict."""
        return dict(self.items())

    def __or__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.copy() | dict(other)

    def __ror__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        return dict(other) | self.copy()

    # Writing: a value that cannot be stored is refused where it is assigned

    def __setitem__(self, key: str, value: Any) -> None:
        encode_value(key, value)
        self.mark_modified()
        if type(value) not in _UNCHANGEABLE:
            self.exposed = True
        super().__setitem__(key, value)
        self._touch((key,))

    def __delitem__(self, key: str) -> None:
        self.mark_modified()
        super().__delitem__(key)
        self._touch((key,))

    def clear(self) -> None:
        self.mark_modified()
        super().clear()

    def pop(self, key: str, default: Any = _MISSING) -> Any:
        self.mark_accessed()
        if super().__contains__(key):
            self.mark_modified()
            self._touch((key,))
        elif default is not _MISSING:
            return default
        return super().pop(key)

    def popitem(self) -> tuple[str, Any]:
        self.mark_modified()
        key, value = super().popitem()
        self._touch((key,))
        return key, value

    def setdefault(self, key: str, default: Any = None) -> Any:
        self.mark_accessed()
        if not super().__contains__(key):
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        changes = dict(*args, **kwargs)
        for key, value in changes.items():
            encode_value(key, value)
        self.mark_modified()
        if not _UNCHANGEABLE.issuperset(map(type, changes.values())):
            self.exposed = True
        super().update(changes)
        self._touch(changes)

    def __ior__(self, other: Any) -> SessionData:  # type: ignore[override]
        self.update(other)
        return self
