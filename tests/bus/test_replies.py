"""Which reply belongs to which command, without a connection."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import BusyLoadingError, ResponseError

from asgi_cluster.backends.redis.errors import ConnectionBroken
from asgi_cluster.backends.redis.replies import Batch, Replies

FORBIDDEN = ResponseError("NOPERM no permissions")


def expected(replies: Replies) -> asyncio.Future[Any]:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    replies.expect(future)
    return future


def batch(replies: Replies, verb: str, *commands: list[str]) -> Batch:
    made = replies.batch(verb, commands)
    replies.expect(made)
    return made


async def test_first_in_first_out() -> None:
    """Errors are replies; a command without a caller has its place, too."""
    replies = Replies()
    first = expected(replies)
    replies.expect(None)
    second, third = expected(replies), expected(replies)
    assert len(replies) == 4
    replies.replied(b"1")
    replies.replied(b"of no interest")
    replies.failed(BusyLoadingError("loading"))
    replies.replied(b"3")
    assert first.result() == b"1"
    assert isinstance(second.exception(), BusyLoadingError)
    assert third.result() == b"3"
    assert len(replies) == 0


async def test_caller_that_has_given_up() -> None:
    """Its reply, or its error, is dropped when it comes."""
    replies = Replies()
    for _ in range(2):
        expected(replies).cancel()
    last = expected(replies)
    replies.replied(b"late")
    replies.failed(FORBIDDEN)
    replies.replied(b"own")
    assert last.result() == b"own"


async def test_batch_is_done_with_its_last_acknowledgement() -> None:
    """Pushes acknowledge its channels in any order; the reply to its PING closes it."""
    replies = Replies()
    subscribed = batch(replies, "SUBSCRIBE", ["a", "b"], ["c"])
    after = expected(replies)
    for channel in ("b", "a", "c"):
        assert replies.acknowledged(b"subscribe", channel)
    assert not subscribed.future.done()
    replies.replied(subscribed.nonce)
    assert subscribed.future.result() == {}
    replies.replied(b"after")
    assert after.result() == b"after"


async def test_refusal_is_that_of_the_command_whose_turn_it_is() -> None:
    """The channels of that command, and of no other one."""
    replies = Replies()
    subscribed = batch(replies, "SSUBSCRIBE", ["a"], ["b"], ["c"])
    assert replies.acknowledged(b"ssubscribe", "a")
    replies.failed(FORBIDDEN)
    assert replies.acknowledged(b"ssubscribe", "c")
    replies.replied(subscribed.nonce)
    assert subscribed.future.result() == {"b": FORBIDDEN}


async def test_push_that_answers_nothing() -> None:
    """A slot that moves away sends the same push unasked: another verb, channel or time."""
    replies = Replies()
    assert not replies.acknowledged(b"sunsubscribe", "a")
    expected(replies)
    assert not replies.acknowledged(b"sunsubscribe", "a")
    replies.replied(b"")
    batch(replies, "SSUBSCRIBE", ["a"])
    assert not replies.acknowledged(b"sunsubscribe", "a")
    assert not replies.acknowledged(b"ssubscribe", "b")


@pytest.mark.parametrize("reply", [b"another", None])
async def test_batch_that_is_closed_by_another_reply(reply: bytes | None) -> None:
    """Out of step: nothing can be trusted any more."""
    replies = Replies()
    batch(replies, "UNSUBSCRIBE", ["a"])
    with pytest.raises(ConnectionBroken, match="out of step"):
        replies.replied(reply)


async def test_batch_whose_acknowledgements_are_missing() -> None:
    """A subscription must not pass as made; an unsubscription may have been answered by an unasked push."""
    replies = Replies()
    left = batch(replies, "SUNSUBSCRIBE", ["a"])
    joined = batch(replies, "SSUBSCRIBE", ["a"])
    replies.replied(left.nonce)
    assert left.future.result() == {}
    with pytest.raises(ConnectionBroken, match="out of step"):
        replies.replied(joined.nonce)


async def test_reply_to_no_command() -> None:
    """As good as a broken connection."""
    with pytest.raises(ConnectionBroken, match="a reply to no command"):
        Replies().replied(b"x")
    with pytest.raises(ConnectionBroken, match="a reply to no command"):
        Replies().failed(FORBIDDEN)


async def test_connection_that_breaks() -> None:
    """All that waits gets an error that says that the outcome is unknown."""
    replies = Replies()
    waiting, subscribed = expected(replies), batch(replies, "SUBSCRIBE", ["a"])
    replies.expect(None)
    replies.lost("cut")
    for future in (waiting, subscribed.future):
        error = future.exception()
        assert isinstance(error, ConnectionBroken)
        assert error.sent
    assert len(replies) == 0
