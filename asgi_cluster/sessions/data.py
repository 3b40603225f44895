"""A dict that notes whether it was read and whether it was changed, as Starlette 1.x's sessions do."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from asgi_cluster.sessions.codec import UNCHANGEABLE, encode_value
from asgi_cluster.sessions.unit_of_work import UnitOfWork

__all__ = ["SessionData"]

_MISSING: Any = object()


class SessionData(dict[str, Any]):
    """The mapping half of a session, and what became of it (``work``).

    ``accessed`` and ``modified`` are Starlette's flags. Every look at it goes through ``mark_accessed`` and
    every change through ``mark_modified``, which raise when the store is unavailable or the response has
    started.
    """

    # A session that the app does not use, as an idle socket's, needs no __dict__.
    __slots__ = ("__dict__", "__weakref__", "work")

    accessed: bool = False
    modified: bool = False

    def __init__(self, work: UnitOfWork) -> None:
        self.work = work

    def mark_accessed(self) -> None:
        """The app looks at the session: the response depends on the cookie. Raises ``StoreUnavailable`` when
        the session could not be read.
        """
        self.accessed = True
        if self.work.state == "unread":
            self.work.check_readable()

    def mark_modified(self) -> None:
        """The app changes the session. Raises ``RuntimeError`` after the response has started,
        ``StoreUnavailable`` when the session could not be read.
        """
        self.mark_accessed()
        self.work.check_writable()
        self.modified = True

    @property
    def unsaved(self) -> bool:
        """Whether a stored session holds changes that were not saved. Costs nothing when the app never read
        it.
        """
        work = self.work
        if not (self.modified or work.exposed) or work.record is None:
            return False
        try:
            return any(work.changes(self))
        except (TypeError, ValueError):
            return True

    def replace(self, values: Mapping[str, Any]) -> None:
        """The app put a plain dict in this object's place: those are the contents now."""
        for key, value in values.items():
            encode_value(key, value)
        self.mark_modified()
        self.work.exposed = True
        self.work.touch(dict.keys(self))
        dict.clear(self)
        dict.update(self, values)
        self.work.touch(values)

    # Reading

    def __getitem__(self, key: str) -> Any:
        self.mark_accessed()
        value = super().__getitem__(key)
        if type(value) not in UNCHANGEABLE:
            self.work.exposed = True
        return value

    def get(self, key: str, default: Any = None) -> Any:
        self.mark_accessed()
        value = super().get(key, default)
        if type(value) not in UNCHANGEABLE:
            self.work.exposed = True
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
        self.work.exposed = True
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self.mark_accessed()
        self.work.exposed = True
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
        if type(value) not in UNCHANGEABLE:
            self.work.exposed = True
        super().__setitem__(key, value)
        self.work.touch((key,))

    def __delitem__(self, key: str) -> None:
        self.mark_modified()
        super().__delitem__(key)
        self.work.touch((key,))

    def clear(self) -> None:
        """Log out, at save time: data and user are gone, and with them the stored session."""
        self.mark_modified()
        self.work.clear(self)

    def pop(self, key: str, default: Any = _MISSING) -> Any:
        self.mark_accessed()
        if super().__contains__(key):
            self.mark_modified()
            self.work.touch((key,))
        elif default is not _MISSING:
            return default
        return super().pop(key)

    def popitem(self) -> tuple[str, Any]:
        self.mark_modified()
        key, value = super().popitem()
        self.work.touch((key,))
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
        if not UNCHANGEABLE.issuperset(map(type, changes.values())):
            self.work.exposed = True
        super().update(changes)
        self.work.touch(changes)

    def __ior__(self, other: Any) -> SessionData:  # type: ignore[override]
        self.update(other)
        return self
