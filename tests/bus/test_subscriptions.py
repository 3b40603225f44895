"""What a subscriber sends and reports: events in, actions out, without a server."""

from __future__ import annotations

import pytest
from redis.exceptions import ResponseError

from asgi_cluster.backends.redis.subscriptions import (
    Acknowledged,
    Action,
    Answer,
    Gap,
    GiveUp,
    Refuse,
    Retry,
    Subscribe,
    Subscriptions,
    Unsubscribe,
)

FORBIDDEN = ResponseError("NOPERM this user has no permissions to access one of the channels")
MOVED = ResponseError("MOVED 1 127.0.0.1:1")


def channels(*names: str) -> frozenset[str]:
    return frozenset(names)


def sent(actions: list[Action]) -> list[Subscribe]:
    return [action for action in actions if isinstance(action, Subscribe)]


def connected(*wanted: str, sharded: bool = False, vital: tuple[str, ...] = ()) -> Subscriptions:
    """Subscribed to ``wanted`` on a connection that is established."""
    subscriptions = Subscriptions(sharded=sharded, vital=vital)
    for channel in wanted:
        subscriptions.want(channel)
    for batch in sent(subscriptions.opened()):
        assert subscriptions.answered(batch, {}) == []
    assert subscriptions.establish() == [Acknowledged(frozenset(wanted))]
    assert not subscriptions.changed
    return subscriptions


def joined(subscriptions: Subscriptions, *names: str) -> Subscribe:
    """Each of ``names`` with a caller that waits, all in one tick; the one command."""
    for name in names:
        subscriptions.want(name)
        assert subscriptions.wait(name)
    (batch,) = sent(subscriptions.flush())
    return batch


# Joins and leaves


def test_joins_of_one_tick_are_one_command() -> None:
    """And one answer acknowledges all of them."""
    subscriptions = connected()
    batch = joined(subscriptions, "b", "a")
    assert batch.commands == [["a", "b"]]
    assert not subscriptions.acknowledged("a")
    assert subscriptions.answered(batch, {}) == [Answer(channels("a", "b")), Acknowledged(channels("a", "b"))]
    assert subscriptions.acknowledged("a")
    assert not subscriptions.wait("a")


def test_many_joins_are_split() -> None:
    """Five hundred channels in one command at most; on a Cluster each has its own, because of the slots."""
    names = [f"{number:04d}" for number in range(1100)]
    assert [len(one) for one in joined(connected(), *names).commands] == [500, 500, 100]
    assert joined(connected(sharded=True), "a", "b").commands == [["a"], ["b"]]


def test_join_and_leave_in_one_tick_cost_nothing() -> None:
    """Nothing is sent, and the caller need not wait."""
    subscriptions = connected()
    subscriptions.want("a")
    assert subscriptions.wait("a")
    subscriptions.drop("a")
    assert subscriptions.flush() == [Answer(channels("a"))]
    assert not subscriptions.changed


def test_leave_and_join_in_one_tick_cost_nothing() -> None:
    """The subscription stands, and a caller has nothing to wait for."""
    subscriptions = connected("a")
    subscriptions.drop("a")
    subscriptions.want("a")
    assert not subscriptions.wait("a")
    assert subscriptions.flush() == []
    assert subscriptions.acknowledged("a")


def test_leave() -> None:
    """One command for all of a tick; nothing is acknowledged any more when it is on its way."""
    subscriptions = connected("a", "b", "c")
    subscriptions.drop("c")
    subscriptions.drop("a")
    assert subscriptions.flush() == [Unsubscribe([["a", "c"]])]
    assert not subscriptions.acknowledged("a")
    assert subscriptions.acknowledged("b")


def test_leave_before_the_acknowledgement() -> None:
    """The caller need not wait, and the acknowledgement that comes later counts for nothing."""
    subscriptions = connected()
    batch = joined(subscriptions, "a")
    subscriptions.drop("a")
    assert subscriptions.flush() == [Answer(channels("a")), Unsubscribe([["a"]])]
    assert subscriptions.answered(batch, {}) == []
    assert not subscriptions.acknowledged("a")


def test_leave_and_join_again_while_the_first_acknowledgement_is_on_its_way() -> None:
    """Only the answer to the last command counts: between the two the server was not subscribed."""
    subscriptions = connected()
    first = joined(subscriptions, "a")
    subscriptions.drop("a")
    subscriptions.flush()
    second = joined(subscriptions, "a")
    assert subscriptions.answered(first, {}) == []
    assert not subscriptions.acknowledged("a")
    assert subscriptions.answered(second, {}) == [Answer(channels("a")), Acknowledged(channels("a"))]


# Refusals


def test_refusal_of_one_channel_of_a_command() -> None:
    """It refuses all of them, so each is sent again by itself; then it is final for those that get it."""
    subscriptions = connected()
    batch = joined(subscriptions, "good", "bad")
    (apart,) = subscriptions.answered(batch, {"good": FORBIDDEN, "bad": FORBIDDEN})
    assert isinstance(apart, Subscribe)
    assert apart.commands == [["bad"], ["good"]]
    assert subscriptions.answered(apart, {"bad": FORBIDDEN}) == [
        Answer(channels("good")),
        Acknowledged(channels("good")),
        Refuse("bad", FORBIDDEN),
    ]
    assert len(subscriptions) == 1


def test_refusal_of_a_command_whose_other_channel_was_left() -> None:
    """The channel that is left may have been the reason: the other one is sent again."""
    subscriptions = connected()
    batch = joined(subscriptions, "good", "bad")
    subscriptions.drop("bad")
    subscriptions.flush()
    (apart,) = subscriptions.answered(batch, {"good": FORBIDDEN, "bad": FORBIDDEN})
    assert isinstance(apart, Subscribe)
    assert apart.commands == [["good"]]


@pytest.mark.parametrize("sharded", [False, True])
def test_refusal_of_a_channel_by_itself(sharded: bool) -> None:
    """Final at once; the channel is not sent on the next connection."""
    subscriptions = connected(sharded=sharded)
    assert subscriptions.answered(joined(subscriptions, "bad"), {"bad": FORBIDDEN}) == [
        Refuse("bad", FORBIDDEN)
    ]
    subscriptions.lost("cut")
    assert subscriptions.opened() == []


def test_refusal_of_a_vital_channel() -> None:
    """Without it the connection is of no use; it stays wanted."""
    subscriptions = Subscriptions(sharded=False, vital=("sessions",))
    subscriptions.want("sessions")
    subscriptions.want("room")
    (batch,) = sent(subscriptions.opened())
    (apart,) = sent(subscriptions.answered(batch, {"sessions": FORBIDDEN, "room": FORBIDDEN}))
    assert subscriptions.answered(apart, {"sessions": FORBIDDEN, "room": FORBIDDEN}) == [
        Refuse("room", FORBIDDEN),
        GiveUp(FORBIDDEN),
    ]
    subscriptions.lost("given up")
    assert [batch.commands for batch in sent(subscriptions.opened())] == [[["sessions"]]]


# Slots that move


def test_moved_while_joining() -> None:
    """A gap on that channel alone; its caller does not wait for the move, and it is sent again later."""
    subscriptions = connected(sharded=True, vital=("b",))
    batch = joined(subscriptions, "a", "b")
    assert subscriptions.answered(batch, {"b": MOVED}) == [
        Answer(channels("a")),
        Acknowledged(channels("a")),
        Answer(channels("b")),
        Gap(channels("b"), "channels are being moved"),
        Retry(channels("b")),
    ]
    subscriptions.retry(("b",))
    assert subscriptions.changed
    (again,) = sent(subscriptions.flush())
    assert subscriptions.answered(again, {}) == [Acknowledged(channels("b"))]


def test_moved_and_left_before_the_retry() -> None:
    """Nothing is sent."""
    subscriptions = connected(sharded=True)
    subscriptions.answered(joined(subscriptions, "a"), {"a": MOVED})
    subscriptions.drop("a")
    subscriptions.retry(("a",))
    assert subscriptions.flush() == []


def test_subscription_that_the_server_ends() -> None:
    """On a Cluster a gap on that channel, which is sent again in the same tick."""
    subscriptions = connected("a", "b", sharded=True)
    assert subscriptions.ended("a") == [Gap(channels("a"), "a channel has moved")]
    assert not subscriptions.acknowledged("a")
    assert subscriptions.acknowledged("b")
    (again,) = sent(subscriptions.flush())
    assert again.commands == [["a"]]


def test_subscription_that_the_server_ends_without_slots() -> None:
    """Where nothing moves, the connection cannot be trusted."""
    assert connected("a").ended("a") == [GiveUp("the server ended a subscription")]


def test_subscription_that_ends_after_it_was_left() -> None:
    """It is no event any more."""
    subscriptions = connected("a", sharded=True)
    subscriptions.drop("a")
    subscriptions.flush()
    assert subscriptions.ended("a") == []


# Connections


def test_no_connection() -> None:
    """Nothing is sent and no caller waits; the connection begins with all that is wanted by then."""
    subscriptions = Subscriptions(sharded=False)
    subscriptions.want("a")
    subscriptions.want("b")
    assert not subscriptions.wait("a")
    subscriptions.drop("b")
    assert not subscriptions.changed
    assert [batch.commands for batch in sent(subscriptions.opened())] == [[["a"]]]


def test_joins_and_leaves_while_a_connection_is_set_up() -> None:
    """No caller waits; they are sent as soon as it is established."""
    subscriptions = Subscriptions(sharded=False)
    subscriptions.want("a")
    (batch,) = sent(subscriptions.opened())
    subscriptions.want("b")
    assert not subscriptions.wait("b")
    subscriptions.drop("a")
    assert subscriptions.answered(batch, {}) == []
    assert not subscriptions.established
    assert subscriptions.establish() == [Acknowledged(channels("a"))]
    assert subscriptions.changed
    unsubscribe, subscribe = subscriptions.flush()
    assert unsubscribe == Unsubscribe([["a"]])
    assert isinstance(subscribe, Subscribe)
    assert subscribe.commands == [["b"]]


def test_moved_while_a_connection_is_set_up() -> None:
    """The connection is established without that channel, which is sent again at once."""
    subscriptions = Subscriptions(sharded=True, vital=("a",))
    subscriptions.want("a")
    (batch,) = sent(subscriptions.opened())
    assert subscriptions.answered(batch, {"a": MOVED}) == [
        Gap(channels("a"), "channels are being moved"),
        Retry(channels("a")),
    ]
    assert subscriptions.establish() == [Acknowledged(channels())]
    (again,) = sent(subscriptions.flush())
    assert again.commands == [["a"]]


def test_lost_connection() -> None:
    """A gap on all that is wanted; no caller waits any longer; the next connection begins with everything."""
    subscriptions = connected("a")
    batch = joined(subscriptions, "b")
    assert subscriptions.lost("cut") == [Answer(channels("b")), Gap(channels("a", "b"), "cut")]
    assert not subscriptions.established
    assert not subscriptions.acknowledged("a")
    (anew,) = sent(subscriptions.opened())
    assert anew.commands == [["a", "b"]]
    assert anew.number != batch.number, "an answer to the old one must not count for the new one"


def test_connection_that_is_closed_on_purpose() -> None:
    """No gap; and none for an attempt that was not established: it was reported before."""
    assert connected("a").lost(None) == []
    subscriptions = connected("a")
    subscriptions.lost("cut")
    subscriptions.opened()
    assert subscriptions.lost("cut again") == []
