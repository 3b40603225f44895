"""How many connections one user, or one session, may have to the endpoint in the whole cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asgi_cluster.config import RealtimeConfig
    from asgi_cluster.rooms.connection import Connection
    from asgi_cluster.rooms.presence_tracker import PresenceTracker

__all__ = ["ConnectionLimits"]


class ConnectionLimits:
    """Counts by presence in rooms that no client can enter, so that a dead node's connections stop counting
    with its presence.
    """

    def __init__(self, presence: PresenceTracker, config: RealtimeConfig) -> None:
        self._presence = presence
        self._per_user = config.max_connections_per_user
        self._per_session = config.max_connections_per_session

    async def enter(self, connection: Connection) -> bool:
        """Count a connection; False when it is one too many. Of connections that come at once, those that
        fit are counted. Raises ``BusUnavailable`` when the store does not answer.
        """
        for room, limit in self._counted(connection):
            if not await self._presence.add(connection, room, limit=limit):
                await self.leave(connection)
                return False
        return True

    async def leave(self, connection: Connection) -> None:
        """It is over. (Its presence goes with its rooms.)"""
        counting = [room for room in connection._present if room not in connection.rooms]
        await self._presence.remove_from(connection, counting)

    def _counted(self, connection: Connection) -> list[tuple[str, int]]:
        counted = []
        handle = connection.socket.handle
        # A control character, which no room of the app's can have.
        # The session first: what it refuses takes no place of the user's, not even for a moment.
        if self._per_session is not None and handle is not None:
            counted.append((f"\x1fsession\x1f{handle}", self._per_session))
        if self._per_user is not None and connection.user_id is not None:
            counted.append((f"\x1fuser\x1f{connection.user_id}", self._per_user))
        return counted
