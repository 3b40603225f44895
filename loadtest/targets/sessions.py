"""The same small app with different sessions, without a server: ``python -m loadtest.targets.sessions``.

Prints one JSON object: the CPU time of a request with each kind of session, in microseconds, measured in
turns.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import resource
import statistics
import sys
from collections.abc import Callable
from typing import Any

import redis.asyncio
from starlette.applications import Starlette
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_cluster import CacheConfig, Cluster, ClusterMiddleware, CookieConfig, SessionConfig

ROUNDS = 9
_numbers = itertools.count(1_000_000)  # writing the stored value again would not be a change


async def _read(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(request.session.get("number")))


async def _write(request: Request) -> PlainTextResponse:
    request.session.update(number=int(request.query_params["n"]), name="Ada Lovelace", role="member")
    return PlainTextResponse("ok")


async def _nothing(request: Request) -> PlainTextResponse:
    return PlainTextResponse("None")


def _app(read: Callable[..., Any] = _read) -> Starlette:
    return Starlette(routes=[Route("/read", read), Route("/write", _write), Route("/anonymous", _nothing)])


async def call(app: Any, path: str, query: bytes = b"", cookie: bytes = b"") -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message
            headers.update(message["headers"])

    await app(
        {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "headers": [(b"host", b"localhost"), *([(b"cookie", cookie)] if cookie else [])],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        },
        receive,
        send,
    )
    return headers


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def _cost(app: Any, path: str, cookies: list[bytes], calls: int) -> float:
    start = _cpu()
    for number in range(calls):
        await call(app, path, b"n=%d" % next(_numbers), cookies[number % len(cookies)])
    return (_cpu() - start) / calls * 1e6


async def _commands(url: str) -> int:
    async with redis.asyncio.Redis.from_url(url) as client:
        info = await client.info("commandstats")
    # Without the heartbeats that renew the lease, and without the commands of this function.
    ignored = ("cmdstat_pexpire", "cmdstat_info", "cmdstat_hello", "cmdstat_client", "cmdstat_ping")
    return sum(value["calls"] for name, value in info.items() if not name.startswith(ignored))


def _starsessions(url: str) -> Any | None:
    try:
        from starsessions import SessionAutoloadMiddleware
        from starsessions import SessionMiddleware as StarMiddleware
        from starsessions.stores.redis import RedisStore
    except ImportError:
        return None
    store = RedisStore(connection=redis.asyncio.Redis.from_url(url))
    return StarMiddleware(SessionAutoloadMiddleware(_app()), store=store, cookie_https_only=False)


def ours(url: str, prefix: str, entries: int) -> tuple[Cluster, Any]:
    sessions = SessionConfig(cookie=CookieConfig(secure=False), cache=CacheConfig(max_entries=entries))
    cluster = Cluster(url, prefix=prefix, sessions=sessions)
    return cluster, ClusterMiddleware(_app(), cluster)


async def measure(url: str, calls: int, people: int) -> dict[str, Any]:
    cached, with_cache = ours(url, "cached", 10_000)
    uncached, without_cache = ours(url, "uncached", 0)
    async with cached, uncached:
        apps: dict[str, tuple[Any, str]] = {
            "no session": (_app(_nothing), "/read"),
            "Starlette cookie": (SessionMiddleware(_app(), "secret"), "/read"),
            "asgi-cluster, cached": (with_cache, "/read"),
            "asgi-cluster, no cookie": (with_cache, "/anonymous"),
            "asgi-cluster, from Redis": (without_cache, "/read"),
            "asgi-cluster, write": (with_cache, "/write"),
        }
        if (star := _starsessions(url)) is not None:
            apps["starsessions on Redis"] = (star, "/read")
        cookies: dict[str, list[bytes]] = {}
        for name, (app, path) in apps.items():
            cookies[name] = [b""]
            if name not in ("no session", "asgi-cluster, no cookie"):
                headers = [await call(app, "/write", b"n=%d" % number) for number in range(people)]
                cookies[name] = [found[b"set-cookie"].split(b";")[0] for found in headers]
            await _cost(app, path, cookies[name], max(people, 200))  # fills the cache
        gc.collect()
        gc.disable()
        counts = []
        for _ in range(3):  # the minimum counts: now and then a node reads the registry
            before = await _commands(url)
            await _cost(with_cache, "/read", cookies["asgi-cluster, cached"], calls)
            counts.append(await _commands(url) - before)
        costs: dict[str, list[float]] = {name: [] for name in apps}
        for _ in range(ROUNDS):
            for name, (app, path) in apps.items():
                slow = "Redis" in name or "write" in name
                costs[name].append(await _cost(app, path, cookies[name], calls // 10 if slow else calls))
            gc.collect()
        stats = cached.stats().cache
    base = costs["no session"]
    return {
        "costs": {name: statistics.median(found) for name, found in costs.items()},
        "added": {
            name: statistics.median(a - b for a, b in zip(found, base, strict=True))
            for name, found in costs.items()
        },
        "commands": min(counts),
        "hit_rate": stats.hit_rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis", required=True)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--people", type=int, default=500)
    options = parser.parse_args()
    import uvloop

    found = uvloop.run(measure(options.redis, options.calls, options.people))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
