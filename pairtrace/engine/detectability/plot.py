"""The detectability report as a picture, in an SVG file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from pairtrace.engine.atomic import replacing
from pairtrace.engine.detectability.figures import Figure, MethodFigures, ModelFigures

_WIDTH, _HEIGHT = 820, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 190, 36, 56
# Okabe and Ito's colours, which people with any colour vision tell apart; black for the model before training.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_TITLES = {
    "behavior": "behaviour",
    "helpful": "helpful",
    "training": "AUC, training",
    "held-out": "AUC, held-out",
    "retrained": "AUC, retrained",
}


def write_figure(path: Path, before: ModelFigures, methods: Sequence[MethodFigures]) -> None:
    """Draw behaviour, helpfulness and areas, a point with its interval for each model.

    Raises:
        ConfigError: the file cannot be written.
    """
    with replacing(path, durable=False) as temporary:
        temporary.write_text(picture(before, methods), encoding="utf-8")


def picture(before: ModelFigures, methods: Sequence[MethodFigures]) -> str:
    """The SVG text."""
    models: list[tuple[str, Mapping[str, Figure]]] = [("before", before.figures)]
    models += [(one.name + (f", {one.runs} runs" if one.runs > 1 else ""), one.figures) for one in methods]
    metrics = [metric for metric in _TITLES if metric in before.figures]
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [
        _text(_LEFT, 20, "Behaviour and detectability before and after training; lines: intervals"),
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="black"/>',
        *(_text(_LEFT - 6, _y(tick / 4) + 4, f"{tick / 4:g}", "end") for tick in range(5)),
    ]
    wide = (right - _LEFT) / max(1, len(metrics))
    for place, metric in enumerate(metrics):
        middle = _LEFT + wide * (place + 0.5)
        parts.append(_text(middle, bottom + 18, _TITLES[metric], "middle"))
        for number, (name, figures) in enumerate(models):
            x = middle + (number - (len(models) - 1) / 2) * wide * 0.7 / len(models)
            parts += _point(x, figures.get(metric), _COLOURS[number % len(_COLOURS)], f"{name}: {metric}")
    for number, (name, _) in enumerate(models):
        y = _TOP + 8 + 18 * number
        colour = _COLOURS[number % len(_COLOURS)]
        parts += [f'<circle cx="{right + 22}" cy="{y}" r="4" fill="{colour}"/>', _text(right + 34, y + 4, name)]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _y(share: float) -> float:
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _point(x: float, figure: Figure | None, colour: str, title: str) -> list[str]:
    """A point with its interval; hovering tells the numbers."""
    if figure is None or figure.value is None:
        return []
    x = round(x, 1)
    told = f"{title} {figure.value:.3f}"
    line = ""
    if figure.low is not None and figure.high is not None:
        told += f" ({figure.low:.3f} to {figure.high:.3f})"
        line = f'<line x1="{x}" x2="{x}" y1="{_y(figure.low)}" y2="{_y(figure.high)}" stroke="{colour}"/>'
    point = f'<circle cx="{x}" cy="{_y(figure.value)}" r="4" fill="{colour}"/>'
    return [f"<g><title>{escape(told)}</title>{line}{point}</g>"]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{round(x, 1)}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
