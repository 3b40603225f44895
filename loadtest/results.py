"""The result of a scenario: a table, checks and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Cell = str | int | float | None


@dataclass
class Check:
    """A statement about the result. ``required``: the scenario fails when it does not hold."""

    text: str
    holds: bool
    required: bool = False


@dataclass
class Plot:
    """Lines over a common axis."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    log: bool = True

    def add(self, line: str, x: float, y: float) -> None:
        self.lines.setdefault(line, []).append((x, y))


@dataclass
class Result:
    """The result of one scenario."""

    name: str
    about: str
    columns: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self, *cells: Cell) -> None:
        assert len(cells) == len(self.columns)
        self.rows.append(list(cells))

    def budget(self, text: str, holds: bool) -> None:
        """Add a budget. A budget that is missed is printed, and is no failure."""
        self.checks.append(Check(text, holds))

    def require(self, text: str, holds: bool) -> None:
        """Add a requirement: the scenario fails when it does not hold."""
        self.checks.append(Check(text, holds, required=True))

    @property
    def failed(self) -> bool:
        return any(check.required and not check.holds for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def percentile(values: Sequence[float], share: float) -> float:
    """By the nearest rank; ``share`` is 0.0 to 1.0. NaN when there are no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def show(cell: Cell) -> str:
    """A cell as text: three significant digits."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        if math.isnan(cell):
            return "-"
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell
