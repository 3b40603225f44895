"""``client.js`` in a real browser, against a server that does what is asked of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import BrowserContext, Page

from tests.browser.fake import Fake, Peer, fake_server
from tests.support.waiting import eventually

CONNECT = """async (options) => {
  const module = await import("/realtime/client.js");
  Object.assign(window, module, { seen: [] });
  window.client = new module.ClusterClient(undefined, { minDelay: 20, maxDelay: 100, ...options });
  for (const event of ["state", "logout", "error", "message"]) {
    client.on(event, (value) => {
      seen.push([event, value.state ?? value.error?.code ?? value.code ?? value.data]);
    });
  }
  client.connect();
}"""
SUBSCRIBE = """() => {
  window.room = client.subscribe("r");
  const events = ["publication", "subscribed", "subscribing", "unsubscribed", "join", "leave", "error"];
  for (const event of events) {
    room.on(event, ({ data, recovered, code, info }) => {
      seen.push([event, event === "publication" ? data : recovered ?? code ?? info?.user]);
    });
  }
}"""


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    async with fake_server() as server:
        yield server


@pytest.fixture
async def page(context: BrowserContext, fake: Fake) -> Page:
    """A page whose JavaScript errors fail the test that asks for ``seen``."""
    made = await context.new_page()
    await made.goto(fake.url)
    return made


async def seen(page: Page) -> list[list[Any]]:
    events: list[list[Any]] = await page.evaluate("seen")
    return events


async def connected(page: Page, fake: Fake, *, options: dict[str, Any] | None = None, **result: Any) -> Peer:
    await page.evaluate(CONNECT, options or {})
    peer = await fake.peer()
    await peer.welcome(**result)
    await page.evaluate("client.ready()")
    return peer


async def subscribed(page: Page, peer: Peer, **result: Any) -> None:
    await page.evaluate(SUBSCRIBE)
    command = await peer.next("subscribe")
    await peer.say({"id": command["id"], "subscribe": result})
    await page.evaluate("room.ready()")


async def test_connection_is_made_without_a_url(page: Page, fake: Fake) -> None:
    """Without a URL the socket is below the page's origin; the reply's ids are the client's."""
    await connected(page, fake, node="node-7", data={"hello": 1})
    assert await page.evaluate("[client.state, client.id, client.node, client.data]") == [
        "connected",
        "c1",
        "node-7",
        {"hello": 1},
    ]


async def test_push_behind_the_subscribe_reply_arrives(page: Page, fake: Fake) -> None:
    """A coalescing server sends the reply and the first publications in one frame."""
    peer = await connected(page, fake)
    await page.evaluate(SUBSCRIBE)
    command = await peer.next("subscribe")
    assert command["subscribe"] == {"channel": "r"}
    await peer.say(
        {"id": command["id"], "subscribe": {}},
        {"push": {"channel": "r", "pub": {"data": "first"}}},
        {"push": {"channel": "r", "join": {"info": {"user": "ada", "client": "x"}}}},
        {"push": {"message": {"data": "to you"}}},
    )
    await eventually(lambda: _ends_with(page, ["message", "to you"]))
    assert (await seen(page))[-4:] == [
        ["subscribed", False],
        ["publication", "first"],
        ["join", "ada"],
        ["message", "to you"],
    ]


async def test_ping_is_answered_with_a_pong(page: Page, fake: Fake) -> None:
    """``{}`` for ``{}``, when the server asked for pongs."""
    peer = await connected(page, fake, ping=25, pong=True)
    await peer.socket.send("{}")
    assert await peer.commands.get() == {}


async def test_commands_of_one_turn_share_a_frame(page: Page, fake: Fake) -> None:
    """Ten publishes are ten lines, and each gets its own reply."""
    peer = await connected(page, fake)
    await page.evaluate("() => { window.all = Promise.all([1, 2, 3].map((n) => client.rpc('double', n))); }")
    commands = [await peer.next("rpc") for _ in range(3)]
    for command in reversed(commands):  # the order of replies does not matter
        await peer.say({"id": command["id"], "rpc": {"data": command["rpc"]["data"] * 2}})
    assert await page.evaluate("all") == [2, 4, 6]


async def test_reconnect_recovers_from_the_last_position(page: Page, fake: Fake) -> None:
    """The subscribe after a lost connection carries epoch and offset, and what was missed is marked."""
    peer = await connected(page, fake)
    await subscribed(page, peer, recoverable=True, positioned=True, epoch="e1", offset=4)
    await peer.say({"push": {"channel": "r", "pub": {"data": "five", "offset": 5}}})
    await eventually(lambda: _ends_with(page, ["publication", "five"]))
    await peer.close(3000, "come again")
    again = await fake.peer()
    await again.welcome()
    command = await again.next("subscribe")
    assert command["subscribe"] == {"channel": "r", "recover": True, "epoch": "e1", "offset": 5}
    await page.evaluate(
        "() => { room.on('publication', ({ recovered }) => seen.push(['recovered', recovered])); }"
    )
    await again.say(
        {
            "id": command["id"],
            "subscribe": {
                "recoverable": True,
                "epoch": "e1",
                "offset": 6,
                "recovered": True,
                "was_recovering": True,
                "publications": [{"data": "six", "offset": 6}],
            },
        }
    )
    await eventually(lambda: _ends_with(page, ["recovered", True]))
    assert (await seen(page))[-3:] == [["subscribed", True], ["publication", "six"], ["recovered", True]]


@pytest.mark.parametrize("code", [1001, 1012, 3000, 3001, 3008, 3012, 4000, 4100, 4499])
async def test_reconnecting_code_is_followed(page: Page, fake: Fake, code: int) -> None:
    """The server wants the client back: it comes."""
    peer = await connected(page, fake)
    await peer.close(code)
    await (await fake.peer()).welcome()
    await page.evaluate("client.ready()")
    assert ["logout", code] not in await seen(page)


@pytest.mark.parametrize(
    ("code", "logout"), [(3500, False), (3999, False), (4500, False), (4501, True), (4502, True)]
)
async def test_terminal_code_is_respected(page: Page, fake: Fake, code: int, logout: bool) -> None:
    """The server does not want it back: it stays away, and says whether the session is over."""
    peer = await connected(page, fake)
    await peer.close(code, "because")
    await eventually(lambda: _state(page, "disconnected"))
    assert (["logout", code] in await seen(page)) is logout
    # Three of its longest waits later there is no second connection.
    await page.evaluate("new Promise((resolve) => setTimeout(resolve, 300))")
    assert fake.count == 1


async def test_command_under_way_is_not_sent_again(page: Page, fake: Fake) -> None:
    """Nobody knows whether it happened: its promise says so, and the next connection does not repeat it."""
    peer = await connected(page, fake)
    await page.evaluate("() => { window.sent = client.publish('r', 1).catch((error) => error); }")
    await peer.next("publish")
    await peer.close(3000)
    again = await fake.peer()
    await again.welcome()
    error = "sent.then((error) => [error instanceof ClusterError, error.code, error.outcomeUnknown])"
    assert await page.evaluate(error) == [True, "connection-lost", True]
    await page.evaluate("client.ready().then(() => { client.rpc('sentinel').catch(() => {}); })")
    await again.next("rpc")


async def test_waiting_commands_are_bounded_and_sent_in_order(page: Page, fake: Fake) -> None:
    """While there is no connection a few commands wait; one more is refused at once."""
    await page.evaluate(CONNECT, {"maxQueue": 2})
    peer = await fake.peer()
    refused = await page.evaluate(
        """() => {
          window.kept = [1, 2].map((n) => client.publish('r', n));
          return client.publish('r', 3).catch((error) => error.code);
        }"""
    )
    assert refused == "queue-full"
    await peer.welcome()
    for number in (1, 2):
        command = await peer.next("publish")
        assert command["publish"]["data"] == number
        await peer.say({"id": command["id"], "publish": {}})
    await page.evaluate("Promise.all(kept)")


async def test_command_without_reply_times_out(page: Page, fake: Fake) -> None:
    """A typed error, and the connection stays."""
    await connected(page, fake, options={"timeout": 100})
    code = "client.rpc('slow').catch((error) => [error.code, error.temporary, client.state])"
    assert await page.evaluate(code) == ["timeout", True, "connected"]


async def test_subscribe_without_reply_in_time_is_made_anew(page: Page, fake: Fake) -> None:
    """By another connection: on this one the server may be at it still, and would refuse a second one."""
    peer = await connected(page, fake, options={"timeout": 300})
    await page.evaluate(SUBSCRIBE)
    await peer.next("subscribe")
    again = await fake.peer()
    assert peer.commands.empty()
    await again.welcome()
    await again.say({"id": (await again.next("subscribe"))["id"], "subscribe": {}})
    await page.evaluate("room.ready()")
    events = [event for event, _ in await seen(page)]
    assert events.count("error") == 1
    assert "unsubscribed" not in events


@pytest.mark.parametrize("listens", ["room", "client"])
async def test_disconnect_when_a_subscribe_got_no_reply(page: Page, fake: Fake, listens: str) -> None:
    """A listener for the error that disconnects has the last word."""
    peer = await connected(page, fake, options={"timeout": 300})
    code = """listens => new Promise(resolve => {
        const room = client.subscribe("r");
        (listens === "room" ? room : client).on("error", () => {
            client.disconnect();
            queueMicrotask(() => resolve([client.state, room.state]));
        });
    })"""
    assert await page.evaluate(code, listens) == ["disconnected", "subscribing"]
    await peer.next("subscribe")
    assert peer.commands.empty()


async def test_error_reply_is_typed(page: Page, fake: Fake) -> None:
    """Code, message and whether another try makes sense."""
    peer = await connected(page, fake)
    await page.evaluate("() => { window.sent = client.presence('r').catch((error) => error); }")
    command = await peer.next("presence")
    await peer.say({"id": command["id"], "error": {"code": 108, "message": "not available"}})
    assert await page.evaluate(
        "sent.then((e) => [e.code === ErrorCode.NOT_AVAILABLE, e.message, e.temporary])"
    ) == [
        True,
        "not available",
        False,
    ]


async def test_refused_subscription_ends_and_temporary_one_is_tried_again(page: Page, fake: Fake) -> None:
    """100 is tried again, 103 is final."""
    peer = await connected(page, fake)
    await page.evaluate(SUBSCRIBE)
    command = await peer.next("subscribe")
    await peer.say({"id": command["id"], "error": {"code": 100, "message": "internal", "temporary": True}})
    command = await peer.next("subscribe")
    await peer.say({"id": command["id"], "error": {"code": 103, "message": "permission denied"}})
    await eventually(lambda: _ends_with(page, ["unsubscribed", 103]))
    assert await page.evaluate("room.ready().catch((error) => error.code)") == "unsubscribed"
    assert await page.evaluate("client.state") == "connected"


@pytest.mark.parametrize(("code", "comes_back"), [(2000, False), (2500, True)])
async def test_unsubscribe_push_is_obeyed(page: Page, fake: Fake, code: int, comes_back: bool) -> None:
    """From 2500 on the client subscribes again; below it is told that it is out."""
    peer = await connected(page, fake)
    await subscribed(page, peer)
    await peer.say({"push": {"channel": "r", "unsubscribe": {"code": code, "reason": "out"}}})
    if comes_back:
        await peer.next("subscribe")
    else:
        await eventually(lambda: _ends_with(page, ["unsubscribed", 2000]))


async def test_latest_sends_the_last_of_many(page: Page, fake: Fake) -> None:
    """Of a hundred moves the first and the last go out, not a queue of a hundred."""
    peer = await connected(page, fake)
    await page.evaluate("() => { for (let n = 1; n <= 100; n += 1) client.latest('r', n, { key: 'a' }); }")
    sent = []
    for _ in range(2):
        command = await peer.next("publish")
        sent.append(command["publish"]["data"])
        await peer.say({"id": command["id"], "publish": {}})
    await page.evaluate("() => { client.rpc('sentinel').catch(() => {}); }")
    await peer.next("rpc")
    # The first turn of the loop takes the newest value already there.
    assert sent[-1] == 100


async def test_missing_ping_makes_the_client_reconnect(page: Page, fake: Fake) -> None:
    """A server that fell silent is given up after the ping interval and the grace."""
    await connected(page, fake, options={"pingGrace": 100}, ping=1, pong=True)
    again = await fake.peer(timeout=5)
    await again.welcome()


async def test_silent_connection_is_checked_when_the_network_changes(page: Page, fake: Fake) -> None:
    """``online`` makes the client ask for a sign of life; without one it reconnects."""
    peer = await connected(page, fake, options={"timeout": 150})
    await page.evaluate(
        "new Promise((resolve) => setTimeout(resolve, 1100)).then(() => dispatchEvent(new Event('online')))"
    )
    await peer.next("ping")
    await (await fake.peer(timeout=5)).welcome()


async def test_waiting_client_reconnects_at_once_when_the_network_is_back(page: Page, fake: Fake) -> None:
    """``online`` cuts a long wait short."""
    peer = await connected(page, fake, options={"minDelay": 10**9, "maxDelay": 10**9})
    await peer.close(3000)
    await eventually(lambda: _state(page, "connecting"))
    await page.evaluate("dispatchEvent(new Event('online'))")
    await (await fake.peer()).welcome()


async def test_unsubscribed_room_stays_left_after_a_reconnect(page: Page, fake: Fake) -> None:
    """The server is told, and the next connection does not subscribe."""
    peer = await connected(page, fake)
    await subscribed(page, peer)
    await page.evaluate("room.unsubscribe()")
    await peer.next("unsubscribe")
    await peer.close(3000)
    again = await fake.peer()
    await again.welcome()
    await page.evaluate("client.ready().then(() => { client.rpc('sentinel').catch(() => {}); })")
    await again.next("rpc")


async def test_token_that_expired_is_fetched_again(page: Page, fake: Fake) -> None:
    """109 at connect, and a token function: it is asked for another one."""
    await page.evaluate(
        f"() => {{ let n = 0; return ({CONNECT})({{ token: () => `t${{++n}}` }}); }}",
    )
    first = await fake.peer()
    command = await first.next("connect")
    assert command["connect"]["token"] == "t1"
    await first.say({"id": command["id"], "error": {"code": 109, "message": "token expired"}})
    second = await fake.peer()
    command = await second.welcome(expires=True, ttl=1)
    assert command["connect"]["token"] == "t2"
    refresh = await second.next("refresh")
    assert refresh["refresh"] == {"token": "t3"}


async def test_refused_connect_is_final(page: Page, fake: Fake) -> None:
    """101 at connect: no second try, and ``ready`` rejects."""
    await page.evaluate(CONNECT, {})
    peer = await fake.peer()
    command = await peer.next("connect")
    await peer.say({"id": command["id"], "error": {"code": 101, "message": "unauthorized"}})
    await eventually(lambda: _state(page, "disconnected"))
    assert ["error", 101] in await seen(page)


async def test_broken_listener_does_not_stop_the_others(page: Page, fake: Fake) -> None:
    """Its error is the page's to see; the rest of the frame is read."""
    peer = await connected(page, fake)
    await subscribed(page, peer)
    await page.evaluate(
        "() => { room.on('publication', ({ data }) => { if (data === 1) throw new Error('mine'); }); }"
    )
    async with page.expect_event("pageerror"):
        await peer.say(*({"push": {"channel": "r", "pub": {"data": n}}} for n in (1, 2)))
    await eventually(lambda: _ends_with(page, ["publication", 2]))


async def test_board_state_is_the_same_in_any_order(page: Page, fake: Fake) -> None:
    """The demo's board: changes in any order end in the same notes, and a missing one shows as a hole."""
    result = await page.evaluate("""async () => {
      const { BoardState } = await import("/state.js");
      const note = (id, version) => ({ id, version });
      const changes = [
        (s) => s.put(note("a", 1)),
        (s) => s.put(note("b", 2)),
        (s) => s.put(note("a", 3)),
        (s) => s.remove("b", 4),
      ];
      const orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]];
      const ends = orders.map((order) => {
        const state = new BoardState();
        for (const index of order) changes[index](state);
        return [[...state.notes.values()], state.version, state.hole];
      });
      const lost = new BoardState();
      for (const index of [0, 1, 3]) changes[index](lost);
      const holed = lost.hole;
      lost.replace(4, [note("a", 3)]);
      const emptied = new BoardState();
      emptied.replace(9, [note("old", 9)]);
      emptied.replace(1, [note("new", 1)]);
      const after = [...lost.notes.values()];
      return { ends, holed, healed: !lost.hole, after, emptied: [...emptied.notes.keys()] };
    }""")
    assert result["ends"] == [[[{"id": "a", "version": 3}], 4, False]] * 4
    assert (result["holed"], result["healed"]) == (True, True)
    assert result["after"] == [{"id": "a", "version": 3}]
    assert result["emptied"] == ["new"]


async def _ends_with(page: Page, event: list[Any]) -> bool:
    events = await seen(page)
    return bool(events) and events[-1] == event


async def _state(page: Page, state: str) -> bool:
    return bool(await page.evaluate("client.state") == state)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            'client.on("connected", () => {})',
            'there is no event "connected": the events are state, logout, publication, message, subscribed, '
            "unsubscribed, join, leave, error",
        ),
        ('client.once("connected")', 'there is no event "connected": the events are state, '),
        (
            'room.on("nonsense", () => {})',
            'there is no event "nonsense": the events are publication, join, leave, subscribed, subscribing, '
            "unsubscribed, error",
        ),
        ('client.subscribe("r", { message: () => {} })', 'there is no event "message": the events are pub'),
        ('client.on("state", 5)', "a listener for state is a function"),
    ],
)
async def test_listener_for_an_unknown_event_is_refused(page: Page, fake: Fake, call: str, told: str) -> None:
    """A listener that would never be called is a TypeError that lists the events."""
    peer = await connected(page, fake)
    await subscribed(page, peer)
    caught = await page.evaluate(
        f"async () => {{ try {{ await {call}; }} catch (e) {{ return [e.name, e.message]; }} }}"
    )
    assert caught is not None
    assert caught[0] == "TypeError"
    assert caught[1].startswith(told)


async def test_subscribe_with_an_unknown_event_leaves_no_subscription(page: Page, fake: Fake) -> None:
    """Nothing is sent for the room either, and a corrected call starts afresh."""
    peer = await connected(page, fake)
    await page.evaluate(
        """() => {
          try {
            client.subscribe("wrong", { publication: () => {}, nonsense: () => {} });
          } catch (error) {
            seen.push(["caught", error.name]);
          }
        }"""
    )
    assert await page.evaluate('client.subscription("wrong") === undefined')
    assert ["caught", "TypeError"] in await seen(page)
    await page.evaluate('() => { client.subscribe("right", { publication: () => {} }); }')
    assert (await peer.next("subscribe"))["subscribe"] == {"channel": "right"}
