"""Charts as plain SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 510, 360
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 14, 42

Scale = Callable[[float], float]


class Point(NamedTuple):
    """Where a run is, with half of its interval and its name."""

    x: float
    y: float
    margin: float
    name: str


@dataclass(frozen=True)
class Curve:
    """Points of one method, in order."""

    name: str
    colour: str
    points: Sequence[Point]


def pareto(curves: Sequence[Curve], label: str, percent: bool = False) -> str:
    """What is retained in % over a cost on a logarithmic axis; points no other beats in both are ringed."""
    points = [point for curve in curves for point in curve.points]
    low_x, high_x = (math.log(end(point.x for point in points)) for end in (min, max))
    pad = 0.05 * (high_x - low_x) or 0.5
    low_x, high_x = low_x - pad, high_x + pad
    low_y = 10 * math.floor(min(min(point.y - point.margin for point in points), 95.0) / 10)
    low_y, high_y = max(0, low_y), max(102.0, 2 + max(point.y for point in points))

    def across(x: float) -> float:
        return LEFT + (math.log(x) - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return TOP + (high_y - max(y, low_y)) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    bottom = HEIGHT - BOTTOM
    drawn = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-size="12" role="img">']
    step = 10 if high_y - low_y > 30 else 5
    for y in range(low_y, math.floor(high_y) + 1, step):
        colour = "#7b8794" if y == 100 else "#e4e7eb"
        drawn.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}" stroke="{colour}"/>'
        )
        drawn.append(_text(LEFT - 8, down(y) + 4, f"{y}%", "end"))
    for x in _ticks(math.exp(low_x), math.exp(high_x)):
        drawn.append(
            f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="#7b8794"/>'
        )
        drawn.append(_text(across(x), bottom + 18, f"{100 * x:g}%" if percent else f"{x:g}", "middle"))
    drawn.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, label, "middle"))
    best = front(points)
    # Coloured curves lie above grey ones.
    for curve in sorted(curves, key=lambda curve: curve.colour.startswith("#b8")):
        drawn += _curve(curve, across, down, best)
    drawn.append("</svg>")
    return "\n".join(drawn)


def front(points: Sequence[Point]) -> set[Point]:
    """Points that no other one beats in cost without losing in what is retained, or the other way round."""
    return {
        point
        for point in points
        if not any(
            other.x <= point.x and other.y >= point.y and (other.x, other.y) != (point.x, point.y) for other in points
        )
    }


def _curve(curve: Curve, across: Scale, down: Scale, best: set[Point]) -> list[str]:
    way = " ".join(f"{across(point.x):.1f},{down(point.y):.1f}" for point in curve.points)
    drawn = [f'<polyline points="{way}" fill="none" stroke="{curve.colour}" stroke-width="1.6"/>']
    for point in curve.points:
        x, y = across(point.x), down(point.y)
        ends = f'y1="{down(point.y - point.margin):.1f}" y2="{down(point.y + point.margin):.1f}"'
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{curve.colour}" stroke-opacity="0.35"/>')
        ring = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6.5" fill="none" stroke="{curve.colour}"/>' if point in best else ""
        )
        title = f"<title>{escape(point.name)}: {point.y:.1f} ± {point.margin:.1f} %</title>"
        drawn.append(f'{ring}<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{curve.colour}">{title}</circle>')
    return drawn


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`: 1, 2 and 5 times powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#616e7c">{escape(words)}</text>'
