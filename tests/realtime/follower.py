"""A light client for hundreds at a time: follows numbered rooms, and judges what it gets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import websockets


class Followed:
    """One room as one client saw it. The messages of a room are the numbers from 0 on."""

    def __init__(self) -> None:
        self.epoch = ""
        self.offset = 0
        self.last: int | None = None
        """The number that came last; ``None``: none since it was told."""
        self.whole = True
        """Whether every number from 0 on came, in order, once."""
        self.told = 0
        """How often it was told that it could not recover."""
        self.wrong = 0
        """Numbers that came twice or out of order, or after one that did not come: a silent loss."""

    def hear(self, number: int) -> None:
        if number != (
            0 if self.last is None and self.whole else number if self.last is None else self.last + 1
        ):
            self.wrong += 1
        self.last = number


class Follower:
    """One connection that comes back, to the next node, as often as it is lost."""

    def __init__(self, endpoints: Sequence[str], rooms: Sequence[str], first: int) -> None:
        self._endpoints = endpoints
        self._next = first
        self._open: set[str] = set()
        self.rooms = {room: Followed() for room in rooms}
        self._ids = dict(enumerate(rooms, 2))
        self.connections = 0
        self.codes: list[int] = []

    @property
    def settled(self) -> bool:
        """Whether it is subscribed everywhere."""
        return len(self._open) == len(self.rooms)

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            endpoint = self._endpoints[self._next % len(self._endpoints)]
            self._next += 1
            try:
                async with websockets.connect(
                    endpoint, proxy=None, compression=None, max_size=None, close_timeout=1, ping_interval=None
                ) as ws:
                    await self._follow(ws)
            except websockets.ConnectionClosed as closed:
                self.codes.append(closed.rcvd.code if closed.rcvd else 1006)
            except (OSError, websockets.InvalidHandshake):
                pass
            self._open.clear()
            await asyncio.sleep(0.1)

    async def _follow(self, ws: websockets.ClientConnection) -> None:
        await ws.send('{"id":1,"connect":{}}')
        self.connections += 1
        waiting: set[int] = set()
        while True:
            missing = [n for n, room in self._ids.items() if room not in self._open and n not in waiting]
            if missing:
                waiting.update(missing)
                await ws.send("\n".join(json.dumps(self._subscribe(number)) for number in missing))
            for line in str(await ws.recv()).split("\n"):
                message = json.loads(line)
                if not message:
                    await ws.send("{}")
                elif "push" in message:
                    self._push(message["push"])
                elif message["id"] > 1:
                    waiting.discard(message["id"])
                    if "error" in message:
                        await asyncio.sleep(0.2)  # a room that cannot be subscribed to now; asked again above
                    else:
                        self._subscribed(self._ids[message["id"]], message["subscribe"])

    def _subscribe(self, number: int) -> dict[str, Any]:
        room = self._ids[number]
        followed = self.rooms[room]
        position = {"recover": True, "offset": followed.offset, "epoch": followed.epoch}
        return {"id": number, "subscribe": {"channel": room} | (position if followed.epoch else {})}

    def _subscribed(self, room: str, result: dict[str, Any]) -> None:
        followed = self.rooms[room]
        if followed.epoch and not result.get("recovered"):
            followed.told += 1
            followed.whole, followed.last = False, None
        for publication in result.get("publications", ()):
            followed.hear(publication["data"])
        followed.epoch, followed.offset = result["epoch"], result.get("offset", 0)
        self._open.add(room)

    def _push(self, push: dict[str, Any]) -> None:
        room = push["channel"]
        if "pub" in push:
            self.rooms[room].hear(push["pub"]["data"])
            self.rooms[room].offset = push["pub"]["offset"]
        elif "unsubscribe" in push:
            assert push["unsubscribe"]["code"] >= 2500
            self._open.discard(room)
