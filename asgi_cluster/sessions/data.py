"""A dict that knows whether it was looked at and whether it was changed, as Starlette 1.x's sessions do."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from asgi_cluster.sessions.codec import encode_value

__all__ = ["SessionData"]

_MISSING: Any = object()
_CONTAINERS = (list, dict)


class SessionData(dict[str, Any]):
    """The mapping half of a session.

    ``accessed`` and ``modified`` are Starlette's flags. Every look at it goes through ``mark_accessed`` and
    every change through ``mark_modified``, which is where an unavailable store and a response under way speak
    up.
    """

    accessed: bool = False
    modified: bool = False
    exposed: bool = False
    """Whether the app has got hold of a list or dict inside, and may have changed it."""

    def mark_accessed(self) -> None:
        """The app looks at the session: the response depends on the cookie."""
        self.accessed = True

    def mark_modified(self) -> None:
        """The app changes the session."""
        self.mark_accessed()
        self.modified = True

    # Reading

    def __getitem__(self, key: str) -> Any:
        self.mark_accessed()
        value = super().__getitem__(key)
        if type(value) in _CONTAINERS:
            self.exposed = True
        return value

    def get(self, key: str, default: Any = None) -> Any:
        self.mark_accessed()
        value = super().get(key, default)
        if type(value) in _CONTAINERS:
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
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.mark_modified()
        super().__delitem__(key)

    def clear(self) -> None:
        self.mark_modified()
        super().clear()

    def pop(self, key: str, default: Any = _MISSING) -> Any:
        self.mark_accessed()
        if super().__contains__(key):
            self.mark_modified()
        elif default is not _MISSING:
            return default
        return super().pop(key)

    def popitem(self) -> tuple[str, Any]:
        self.mark_modified()
        return super().popitem()

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
        super().update(changes)

    def __ior__(self, other: Any) -> SessionData:  # type: ignore[override]
        self.update(other)
        return self
