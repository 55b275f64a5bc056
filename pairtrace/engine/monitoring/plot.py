"""The log as a picture: shares of clusters over steps, in an SVG file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from pairtrace.engine.atomic import replacing

_WIDTH, _HEIGHT = 820, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 210, 36, 48
# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Those with the highest shares are drawn.
_MOST_CURVES = 12
_SEVERE = "#C00000"
_GREY = "#777777"


def write_plot(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Draw the log.

    Args:
        path: of the SVG file.
        entries: lines of the log, one per step, ascending.

    Raises:
        ConfigError: the file cannot be written.
    """
    with replacing(path, durable=False) as temporary:
        temporary.write_text(_picture(entries), encoding="utf-8")


def _picture(entries: Sequence[dict[str, Any]]) -> str:
    curves: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for entry in entries:
        for line in entry["clusters"]:
            if line["kind"] != "candidate":
                curves.setdefault(line["name"], []).append((entry["step"], line))
    steps = [entry["step"] for entry in entries]
    changed = [(entry["step"], entry["changed"] / max(1, entry["items"])) for entry in entries]
    shown = sorted(curves, key=lambda name: -max(line["now"]["share"] for _, line in curves[name]))[:_MOST_CURVES]
    curves = {name: points for name, points in curves.items() if name in shown}
    ends = [line["now"]["interval"][1] for points in curves.values() for _, line in points]
    highest = max([share for _, share in changed] + ends, default=0.0)
    axes = _Axes(first=min(steps, default=0), last=max(steps, default=1), highest=max(highest, 0.05))
    parts = [*axes.frame(), axes.curve(changed, _GREY, dashes="5 4"), *_legend("all changed answers", 0, _GREY)]
    for number, (name, points) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        parts += [
            axes.band([(step, *line["now"]["interval"]) for step, line in points], colour),
            axes.curve([(step, line["now"]["share"]) for step, line in points], colour),
            axes.curve([(step, line["start"]["interval"][1]) for step, line in points], colour, dashes="1 3"),
            *_legend(name + (" (flagged)" if points[-1][1]["flagged"] else ""), number + 1, colour),
        ]
    parts += [axes.mark(entry["step"], one) for entry in entries for one in entry["raised"]]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


class _Axes:
    """Where a step and a share lie on the picture."""

    def __init__(self, *, first: int, last: int, highest: float) -> None:
        self._first, self._last, self._highest = first, max(last, first + 1), highest

    def x(self, step: float) -> float:
        share = (step - self._first) / (self._last - self._first)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, share: float) -> float:
        return round(_HEIGHT - _BOTTOM - share / self._highest * (_HEIGHT - _TOP - _BOTTOM), 1)

    def frame(self) -> list[str]:
        """Lines, ticks and titles."""
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        parts = [
            _text(_LEFT, 20, "Share of answers by cluster; shaded: interval; dotted: what M0's own answers reach"),
            _text((_LEFT + right) / 2, _HEIGHT - 10, "step of training", anchor="middle"),
            f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="black"/>',
        ]
        for number in range(5):
            share = self._highest * number / 4
            step = self._first + (self._last - self._first) * number / 4
            parts += [
                _text(_LEFT - 6, self.y(share) + 4, f"{share:.0%}" if self._highest >= 0.2 else f"{share:.1%}", "end"),
                _text(self.x(step), bottom + 16, f"{step:.0f}", "middle"),
            ]
        return parts

    def curve(self, points: Sequence[tuple[int, float]], colour: str, *, dashes: str = "none") -> str:
        """A line through points."""
        places = " ".join(f"{self.x(step)},{self.y(share)}" for step, share in points)
        marks = "".join(f'<circle cx="{self.x(step)}" cy="{self.y(share)}" r="2"/>' for step, share in points)
        return (
            f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.6" '
            f'stroke-dasharray="{dashes}"/><g fill="{colour}">{marks if dashes == "none" else ""}</g>'
        )

    def band(self, points: Sequence[tuple[int, float, float]], colour: str) -> str:
        """The area between two lines."""
        there = [f"{self.x(step)},{self.y(low)}" for step, low, _ in points]
        back = [f"{self.x(step)},{self.y(high)}" for step, _, high in reversed(points)]
        return f'<polygon points="{" ".join(there + back)}" fill="{colour}" fill-opacity="0.12"/>'

    def mark(self, step: int, raised: dict[str, Any]) -> str:
        """A vertical line where something was raised; hovering tells what."""
        colour = _GREY if raised["severity"] == "note" else _SEVERE
        x = self.x(step)
        sign = "" if raised["severity"] == "note" else _text(x, _TOP - 2, "alert", "middle", _SEVERE)
        return (
            f'<g><title>step {step}: {escape(raised["text"])}</title><line x1="{x}" x2="{x}" y1="{_TOP}" '
            f'y2="{_HEIGHT - _BOTTOM}" stroke="{colour}" stroke-width="1.5" stroke-dasharray="3 3"/>{sign}</g>'
        )


def _legend(name: str, number: int, colour: str) -> list[str]:
    y = _TOP + 8 + 18 * number
    x = _WIDTH - _RIGHT + 16
    return [f'<rect x="{x}" y="{y - 5}" width="14" height="4" fill="{colour}"/>', _text(x + 20, y + 1, name)]


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "black") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
