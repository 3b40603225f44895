"""The memory that a process under test has allocated, by package. Needs ``PYTHONTRACEMALLOC=1``."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections import Counter
from pathlib import Path


def by_package() -> dict[str, int]:
    """Bytes that are allocated now, by top-level package; those of the standard library by module.

    Memory that C code allocates without Python's allocators (libuv, the kernel's buffers) is not counted.
    Empty when tracemalloc is off.
    """
    if not tracemalloc.is_tracing():
        return {}
    gc.collect()
    snapshot = tracemalloc.take_snapshot().filter_traces(
        [tracemalloc.Filter(False, tracemalloc.__file__), tracemalloc.Filter(False, __file__)]
    )
    held: Counter[str] = Counter()
    for statistic in snapshot.statistics("filename"):
        held[_package(statistic.traceback[0].filename)] += statistic.size
    return dict(held)


def _package(filename: str) -> str:
    """``uvicorn`` for a file of uvicorn's; ``asyncio`` for one of the standard library's."""
    path = Path(filename)
    for place in sorted((Path(entry).absolute() for entry in sys.path if entry), reverse=True):
        if path.is_relative_to(place):
            return path.relative_to(place).parts[0].removesuffix(".py")
    return path.stem
