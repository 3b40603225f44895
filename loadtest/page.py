"""The results as one self-contained HTML page: tables, and plots as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from loadtest.results import Plot, Result, show

_COLOURS = ("#3366cc", "#dc5a2b", "#2a9d5c", "#8e44ad", "#b8860b", "#444444", "#d63384", "#17a2b8")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _LEGEND = 640, 340, 64, 44, 30, 200
_STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em 1ex; border-bottom: 1px solid #ddd }
th { text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums }
.ok { color: #2a7d4c } .miss { color: #a86a00 } .fail { color: #b00020; font-weight: 600 }
svg { display: block; margin: 1.5em 0; max-width: 100% }
svg text { font: 12px sans-serif; fill: #333 }
@media (prefers-color-scheme: dark) {
  body { background: #181a1b; color: #ddd } th, td { border-color: #444 } svg text { fill: #ccc }
}
"""


def render(machine: dict[str, Any], results: Sequence[Result]) -> str:
    """A page that loads nothing from other places."""
    about = ", ".join(f"{escape(key)}: {escape(str(value))}" for key, value in machine.items())
    parts = "\n".join(_section(result) for result in results)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>asgi-cluster load test</title>'
        f"<style>{_STYLE}</style><h1>asgi-cluster load test</h1><p>{about}</p>\n{parts}</html>\n"
    )


def _section(result: Result) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in result.columns)
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="{"text" if isinstance(cell, str) else "number"}">{escape(show(cell))}</td>'
            for cell in row
        )
        + "</tr>"
        for row in result.rows
    )
    checks = "".join(
        f'<li class="{"ok" if check.holds else "fail" if check.required else "miss"}">'
        f"{'ok' if check.holds else 'FAILED' if check.required else 'not met'}: {escape(check.text)}</li>"
        for check in result.checks
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in result.notes)
    plots = "".join(_plot(plot) for plot in result.plots if plot.lines)
    return (
        f"<h2>{escape(result.name)}</h2><p>{escape(result.about)} ({result.seconds:.0f} s)</p>"
        f"<table><tr>{head}</tr>{rows}</table><ul>{checks}</ul>{notes}{plots}"
    )


class _Axis:
    """From values to pixels, logarithmic or from zero."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool) -> None:
        self._log = log and min(values) > 0
        low, high = min(values), max(values)
        if self._log:
            low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9)
        else:
            low, high = min(0.0, low), high or 1.0
        self._low, self._high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        if self._log:
            share = math.log(value / self._low) / math.log(self._high / self._low)
        else:
            share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self._log:
            decades = round(math.log10(self._high / self._low))
            return [self._low * 10**step for step in range(decades + 1)]
        return [self._low + (self._high - self._low) * step / 4 for step in range(5)]


def _plot(plot: Plot) -> str:
    points = [point for line in plot.lines.values() for point in line if not math.isnan(point[1])]
    if not points:
        return ""
    across = _Axis([x for x, _ in points], _LEFT, _WIDTH - _LEGEND, log=plot.log)
    up = _Axis([y for _, y in points], _HEIGHT - _BOTTOM, _TOP, log=plot.log)
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _LEGEND
    parts = [f'<text x="{_LEFT}" y="18">{escape(plot.title)}</text>']
    parts += [
        f'<text x="{across(tick):.0f}" y="{floor + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in across.ticks()
    ]
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(plot.x)}</text>'
    )
    parts.append(f'<text x="4" y="{_TOP - 2}">{escape(plot.y)}</text>')
    for number, (name, line) in enumerate(plot.lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dots = [(across(x), up(y)) for x, y in sorted(line) if not math.isnan(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in dots]
        y = _TOP + 8 + 18 * number
        parts.append(f'<rect x="{right + 12}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{right + 28}" y="{y}">{escape(name)}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">{"".join(parts)}</svg>'
