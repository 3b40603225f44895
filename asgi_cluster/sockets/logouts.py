"""Which users were logged out lately, for a connection whose user is named after it began.

A connect hook, ``identify`` or the app itself may name the user of a connection after a while. A logout
of that user that arrives meanwhile does not find the connection in the hub's index, and has to be found here.
"""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["RecentLogouts"]

_LIMIT = 10_000


class RecentLogouts:
    """Logouts of users that this node has processed: the latest of each user, at most ``limit`` users.

    ``last`` numbers them: take it before the decision begins, and pass it to ``since`` when the decision is
    made.
    """

    __slots__ = ("_forgotten", "_limit", "_users", "last")

    def __init__(self, *, limit: int = _LIMIT) -> None:
        self._limit = limit
        # By user: the latest logout, the session that it kept, the latest one that did not keep that session,
        # and the name of the latest one.
        self._users: OrderedDict[str, tuple[int, str | None, int, str]] = OrderedDict()
        self._forgotten = 0
        self.last = 0
        """The number of the latest logout; 0 before the first."""

    def record(self, user: str, keep: str | None, name: str = "") -> None:
        """``user`` is being logged out everywhere but in the session ``keep``. ``name`` is the logout's in
        the store, ``""`` when this node has not received it.
        """
        self.last += 1
        before = self._users.pop(user, None)
        spared_not = 0 if before is None else before[2] if before[1] == keep else before[0]
        if before is not None and not name:
            name = before[3]  # the message may come before the reply on the node that logs out
        self._users[user] = (self.last, keep, self.last if keep is None else spared_not, name)
        if len(self._users) > self._limit:
            self._forgotten = self._users.popitem(last=False)[1][0]

    def since(self, number: int, user: str, handle: str | None) -> bool | None:
        """Whether a connection of ``user`` with the session ``handle`` would have been closed by a logout
        after ``number``; ``None`` when the record does not reach back so far: more than ``limit`` users were
        logged out since.
        """
        latest, kept, spared_not, _ = self._users.get(user, (0, None, 0, ""))
        if (spared_not if handle is not None and handle == kept else latest) > number:
            return True
        return None if number < self._forgotten else False

    def has(self, user: str, name: str) -> bool:
        """Whether the latest logout of ``user`` that was recorded with a name is this one."""
        found = self._users.get(user)
        return found is not None and found[3] == name
