"""The node's local session cache: TTL, LRU, statistics, and the rules that bound its age.

Pure and synchronous: it does no I/O and takes its time from the lease's clock. A *read* is a read of the
store that is under way:

    read = cache.begin(handle)       # before the read is sent
    record = await store.read(handle)
    cache.finish(read, record)          # kept only if nothing happened in between

An invalidation, a local write or a gap *detaches* the reads it touches: their result may be from before the
change, so their waiters get it, it is not cached, and later readers start a new read. Entries are served
only while their bucket's lease is live, at the moment they are returned. A local write is sent inside of
``changing``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from asgi_cluster.bus.lease import Lease
from asgi_cluster.ids import Handle, UserId, bucket_of
from asgi_cluster.sessions.entry import CacheStats, Entry, PendingRead
from asgi_cluster.sessions.store import Record

__all__ = ["SessionCache"]

_MAX_ABSENT = 1024


class SessionCache:
    """Answers for handles, bounded in number and in age.

    ``lease(bucket)`` is the lease that vouches for a bucket. ``stale_for`` above 0 keeps what a gap flushes,
    up to that many seconds after its read, for ``stale`` alone.
    """

    def __init__(
        self, lease: Callable[[int], Lease], *, ttl: float, max_entries: int, stale_for: float = 0.0
    ) -> None:
        self._lease = lease
        self._ttl = ttl
        self._max_entries = max_entries
        self._stale_for = stale_for
        self._entries: OrderedDict[Handle, Entry] = OrderedDict()
        # Answers "no such session" are cheap to provoke with invented cookies: they must not push real
        # sessions out.
        self._absent: OrderedDict[Handle, Entry] = OrderedDict()
        self._flushed: OrderedDict[Handle, Entry] = OrderedDict()
        self._reads: dict[Handle, PendingRead] = {}
        self._by_user: dict[UserId, set[Handle]] = {}
        self._hits = self._misses = self._bypassed = 0
        self._evictions = self._invalidations = self._flushes = 0

    def get(self, handle: Handle) -> Entry | None:
        """The entry, if it may be served at this moment. Counts a hit or a miss."""
        entry = self._entries.get(handle)
        if entry is None:
            entry = self._absent.get(handle)
        if entry is not None:
            now = entry.lease.clock()
            if now < entry.lease.until:
                if now < entry.until:
                    self._hits += 1
                    if entry.record is not None:
                        self._entries.move_to_end(handle)
                    return entry
                self._remove(handle)
            else:
                self._bypassed += 1
        self._misses += 1
        return None

    def lease(self, handle: Handle) -> Lease:
        """The lease of this session's bucket."""
        return self._lease(int(handle[:2], 16))

    def stale(self, handle: Handle) -> Entry | None:
        """The last confirmed state, not older than ``stale_for``, for when the store does not answer."""
        entry = self._entries.get(handle) or self._flushed.get(handle)
        if entry is None or entry.record is None:
            return None
        now = entry.lease.clock()
        return entry if now < min(entry.read_at + self._stale_for, entry.expires_at) else None

    # Reading

    def pending(self, handle: Handle) -> PendingRead | None:
        """The read under way that a new reader may join: one that nothing has overtaken."""
        return self._reads.get(handle)

    def begin(self, handle: Handle) -> PendingRead:
        """A read of the store is about to be sent."""
        lease = self.lease(handle)
        read = PendingRead(handle, lease.clock(), lease)
        self._reads[handle] = read
        return read

    def finish(self, read: PendingRead, record: Record | None) -> Entry:
        """The store answered. The answer is kept if the read is still attached and the lease is live."""
        entry = Entry(record, read.begun_at, self._ttl, read.lease)
        if self._may_keep(read):
            self._keep(read.handle, entry)
        self.abort(read)
        return entry

    def abort(self, read: PendingRead) -> None:
        """The read has ended, with or without an answer: no reader can join it any more."""
        if self._reads.get(read.handle) is read:
            del self._reads[read.handle]

    def _may_keep(self, read: PendingRead) -> bool:
        return read.attached and read.lease.live

    def _keep(self, handle: Handle, entry: Entry) -> None:
        self._remove(handle)
        record = entry.record
        if record is None:
            self._absent[handle] = entry
            if len(self._absent) > _MAX_ABSENT:
                self._absent.popitem(last=False)
            return
        if self._max_entries == 0:
            return
        self._entries[handle] = entry
        if record.user is not None:
            self._by_user.setdefault(record.user, set()).add(handle)
        if len(self._entries) > self._max_entries:
            self._remove(next(iter(self._entries)))
            self._evictions += 1

    def _remove(self, handle: Handle) -> bool:
        found = self._absent.pop(handle, None) is not None
        entry = self._entries.pop(handle, None)
        if entry is None:
            return found
        if entry.record is not None and entry.record.user is not None:
            handles = self._by_user[entry.record.user]
            handles.discard(handle)
            if not handles:
                del self._by_user[entry.record.user]
        return True

    # Invalidation

    def changing(self, handle: Handle) -> _Changing:
        """``with cache.changing(handle):`` while a change of the session is sent to the store."""
        return _Changing(self, handle)

    @contextmanager
    def changing_user(self, user: UserId, *, keep: Handle | None) -> Iterator[None]:
        """As ``changing``, for all sessions of a user but ``keep``."""
        self.drop_user(user, keep=keep)
        try:
            yield
        finally:
            self.drop_user(user, keep=keep)

    def drop(self, handle: Handle) -> None:
        """The session changed, or is about to."""
        if self._remove(handle):
            self._invalidations += 1
        self._flushed.pop(handle, None)
        self._detach(handle)

    def drop_user(self, user: UserId, *, keep: Handle | None = None) -> None:
        """Every session of ``user`` is over, or changed, as ``keep`` did: it has a new epoch."""
        for handle in list(self._by_user.get(user, ())):
            if handle != keep:
                self.drop(handle)
        for handle in [h for h, e in self._flushed.items() if e.record is not None and e.record.user == user]:
            if handle != keep:
                del self._flushed[handle]
        # A read has no user yet, but the user's sessions are in the user's bucket.
        self._detach_bucket(bucket_of(user))

    def flush(self, buckets: frozenset[int] | None = None) -> None:
        """Messages may have been lost, for these buckets or (``None``) for all."""
        self._flushes += 1
        if self._stale_for:
            self._flushed.update(self._entries)
            while len(self._flushed) > self._max_entries:
                self._flushed.popitem(last=False)
        if buckets is None:
            self._entries.clear()
            self._absent.clear()
            self._by_user.clear()
            for handle in list(self._reads):
                self._detach(handle)
            return
        for handle in [h for h in (*self._entries, *self._absent) if int(h[:2], 16) in buckets]:
            self._remove(handle)
        for bucket in buckets:
            self._detach_bucket(bucket)

    def _detach(self, handle: Handle) -> None:
        read = self._reads.pop(handle, None)
        if read is not None:
            read.attached = False

    def _detach_bucket(self, bucket: int) -> None:
        prefix = f"{bucket:02x}."
        for handle in [h for h in self._reads if h.startswith(prefix)]:
            self._detach(handle)

    def stats(self) -> CacheStats:
        """A snapshot."""
        return CacheStats(
            hits=self._hits,
            misses=self._misses,
            bypassed=self._bypassed,
            evictions=self._evictions,
            invalidations=self._invalidations,
            flushes=self._flushes,
            size=len(self._entries),
            max_entries=self._max_entries,
        )

    def __repr__(self) -> str:
        return f"<SessionCache {len(self._entries)}/{self._max_entries}, {len(self._reads)} pending>"


class _Changing:
    __slots__ = ("_cache", "_handle")

    def __init__(self, cache: SessionCache, handle: Handle) -> None:
        self._cache = cache
        self._handle = handle

    # Before the write: no read on this node may get the old value once the write can have happened. After it,
    # whatever its outcome: a read that began in between may have got the old value, and an unknown outcome
    # counts as changed.

    def __enter__(self) -> None:
        self._cache.drop(self._handle)

    def __exit__(self, *error: object) -> None:
        self._cache.drop(self._handle)
