"""Cached reads with ten sessions and with very many: ``python -m loadtest.targets.stored``.

Prints one JSON object. Two clusters in one process on one Redis: one has ten sessions, stored and cached; the
other has ``--stored`` sessions and a full cache. Blocks of requests to the two alternate.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import statistics
import sys
import time
from typing import Any

import redis.asyncio

from asgi_cluster.ids import new_handle
from loadtest.results import percentile
from loadtest.targets.sessions import call, ours

FEW = 10
ENTRIES = 10_000
PAIRS = 21
BLOCK = 2000
_AT_ONCE = 1000


async def _fill(client: redis.asyncio.Redis, prefix: str, app: Any, count: int) -> list[bytes]:
    """Store ``count`` copies of a session that the app made; returns the cookies of up to ``ENTRIES`` of
    them.
    """
    headers = await call(app, "/write", b"n=1")
    cookie = headers[b"set-cookie"].split(b";")[0]
    name, _, credentials = cookie.partition(b"=")
    secret = credentials.rpartition(b".")[2]
    cookies = [cookie]
    (key,) = [key async for key in client.scan_iter(match=f"{prefix}:*:s:*", count=_AT_ONCE)]
    record, lives = await client.dump(key), await client.pttl(key)
    assert record is not None
    left = count - 1
    while left:
        pipeline = client.pipeline(transaction=False)
        for _ in range(min(left, _AT_ONCE)):
            handle = new_handle(None)
            bucket, token = handle.split(".")
            pipeline.restore(f"{prefix}:{{{bucket}}}:s:{token}", lives, record)
            if len(cookies) < ENTRIES:
                cookies.append(b"%s=%s.%s" % (name, handle.encode(), secret))
            left -= 1
        await pipeline.execute()
    return cookies


async def _remove(client: redis.asyncio.Redis, *prefixes: str) -> None:
    # The server may be the user's own, and the sessions would stay there until their timeout.
    for prefix in prefixes:
        pipeline = client.pipeline(transaction=False)
        async for key in client.scan_iter(match=f"{prefix}:*", count=_AT_ONCE):
            pipeline.unlink(key)
            if len(pipeline) >= _AT_ONCE:
                await pipeline.execute()
        await pipeline.execute()


async def _block(app: Any, cookies: list[bytes], choose: random.Random) -> list[float]:
    """The wall clock time of each read in a block, in microseconds."""
    took = []
    for cookie in choose.choices(cookies, k=BLOCK):
        start = time.perf_counter_ns()
        await call(app, "/read", cookie=cookie)
        took.append((time.perf_counter_ns() - start) / 1000)
    return took


async def measure(url: str, stored: int) -> dict[str, Any]:
    names = [f"{name}-{secrets.token_hex(4)}" for name in ("few", "many")]
    (few, with_few), (many, with_many) = (ours(url, name, ENTRIES) for name in names)
    async with redis.asyncio.Redis.from_url(url) as client, few, many:
        before = (await client.info("memory"))["used_memory"]
        try:
            apps = [
                (with_few, await _fill(client, names[0], with_few, FEW)),
                (with_many, await _fill(client, names[1], with_many, stored)),
            ]
            held = (await client.info("memory"))["used_memory"] - before
            for app, cookies in apps:
                for cookie in cookies:  # fills the cache
                    await call(app, "/read", cookie=cookie)
            hits = many.stats().cache.hits
            choose = random.Random(1)
            marks: list[list[tuple[float, float]]] = []
            for _ in range(PAIRS):
                blocks = [await _block(app, cookies, choose) for app, cookies in apps]
                marks.append([(percentile(block, 0.5), percentile(block, 0.99)) for block in blocks])
            cache = many.stats().cache
        finally:
            await _remove(client, *names)
    return {
        "p50": [statistics.median(pair[side][0] for pair in marks) for side in (0, 1)],
        "p99": [statistics.median(pair[side][1] for pair in marks) for side in (0, 1)],
        "ratio": statistics.median(large[1] / small[1] for small, large in marks),
        "cached": cache.size,
        "hits": (cache.hits - hits) / (PAIRS * BLOCK),
        "redis_bytes": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis", required=True)
    parser.add_argument("--stored", type=int, required=True)
    options = parser.parse_args()
    import uvloop

    json.dump(uvloop.run(measure(options.redis, options.stored)), sys.stdout)


if __name__ == "__main__":
    main()
