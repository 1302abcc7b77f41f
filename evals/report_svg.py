"""Charts as SVG, coloured by the style of the page that they are in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 360, 300
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 42
MOST_TICKS = 6

Scale = Callable[[float], float]


class Point(NamedTuple):
    """Where a run is, with half of its interval and its name."""

    x: float
    y: float
    margin: float
    name: str


@dataclass(frozen=True)
class Curve:
    """Points of one method, in order, and a colour as CSS has it."""

    name: str
    colour: str
    points: Sequence[Point]


def pareto(curves: Sequence[Curve], label: str, percent: bool = False) -> str:
    """What is retained in % over a cost on a logarithmic axis; points no other beats in both are ringed.

    Curves lie on those before them.
    """
    points = [point for curve in curves for point in curve.points]
    low_x, high_x = (math.log(end(point.x for point in points)) for end in (min, max))
    pad = 0.05 * (high_x - low_x) or 0.5
    low_x, high_x = low_x - pad, high_x + pad
    low_y = max(0, 10 * math.floor(min(min(point.y - point.margin for point in points), 95.0) / 10))
    high_y = max(102.0, 2 + max(point.y for point in points))

    def across(x: float) -> float:
        return LEFT + (math.log(x) - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return TOP + (high_y - min(max(y, low_y), high_y)) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    bottom = HEIGHT - BOTTOM
    drawn = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12" role="img" aria-label="retained by {escape(label)}">']
    step = 20 if high_y - low_y > 60 else 10 if high_y - low_y > 30 else 5
    for y in range(-(-low_y // step) * step, math.floor(high_y) + 1, step):
        kind = "axis" if y == 100 else "grid"
        drawn.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        drawn.append(_text(LEFT - 6, down(y) + 4, f"{y}%", "end"))
    for x in ticks(math.exp(low_x), math.exp(high_x)):
        drawn.append(f'<line class="axis" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        drawn.append(_text(across(x), bottom + 18, f"{100 * x:.6g}%" if percent else f"{x:.6g}", "middle"))
    drawn.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, label, "middle"))
    best = front(points)
    for curve in curves:
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


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`: few enough to have room, evenly apart where that is not far."""
    if high < 5 * low:
        step = next(step for step in _steps(high - low) if (high - low) / step <= MOST_TICKS)
        return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    return found if len(found) <= MOST_TICKS else [10.0**power for power in powers if low <= 10.0**power <= high]


def _steps(span: float) -> list[float]:
    power = math.floor(math.log10(span)) - 1
    return [digit * 10.0**more for more in (power, power + 1) for digit in (1, 2, 5)]


def _curve(curve: Curve, across: Scale, down: Scale, best: set[Point]) -> list[str]:
    way = " ".join(f"{across(point.x):.1f},{down(point.y):.1f}" for point in curve.points)
    drawn = [f'<g class="curve" style="--hue: {curve.colour}"><polyline points="{way}" stroke-width="1.6"/>']
    for point in curve.points:
        x, y = across(point.x), down(point.y)
        ends = f'y1="{down(point.y - point.margin):.1f}" y2="{down(point.y + point.margin):.1f}"'
        drawn.append(f'<line class="margin" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>' if point in best else ""
        title = f"<title>{escape(point.name)}: {point.y:.1f} ± {point.margin:.1f} %</title>"
        drawn.append(f'{ring}<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.8">{title}</circle>')
    return [*drawn, "</g>"]


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
