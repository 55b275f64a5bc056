"""What the front door shows: progress bars on stderr, and answers as text. Nothing here prints."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pairtrace.engine.cost_table import CostLine
    from pairtrace.engine.progress import Progress
    from pairtrace.engine.ranking import RankedPair, SourceShare


# Where stderr is no terminal (a log file, CI), a line this often stands in for the moving bar, in seconds.
_LOG_EVERY = 30.0
# Exit code of a command that did its work and found something to raise an alarm about.
ALERTED = 3


@dataclass(frozen=True)
class Answer:
    """What a command has to say on stdout.

    Attributes:
        figures: plain JSON values.
        json: print the figures as one JSON object.
        text: what people read instead; None for the figures as a table.
        error: what went wrong all the same; it is reported after the figures, and the exit code is 1.
        code: exit code where nothing went wrong.
    """

    figures: dict[str, Any]
    json: bool
    text: str | None = None
    error: str | None = None
    code: int = 0

    def __str__(self) -> str:
        """What to print."""
        if self.json:
            return json.dumps(self.figures, default=str)
        return summary_text(self.figures) if self.text is None else self.text


def progress() -> Progress:
    """Bars on stderr, or nothing with --quiet, which takes the notes' level away as well."""
    from pairtrace.engine.progress import NULL_PROGRESS

    return Bars() if logging.getLogger("pairtrace").isEnabledFor(logging.INFO) else NULL_PROGRESS


class Bars:
    """Shows the progress of one stage after another on stderr; implements `engine.progress.Progress`."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._logged = 0.0

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin a bar of `total` units; None where no number is known, and only the time is shown."""
        from rich import progress
        from rich.console import Console

        self.finish()
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.TextColumn("{task.fields[counts]}"),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = progress.Progress(*columns, console=Console(stderr=True))
        self._bar.start()
        counts = "" if total is None else f"0/{total:,.0f} {unit}, -/s"
        self._bar.add_task(stage, total=total, unit=unit, counts=counts)
        self._logged = time.monotonic()

    def advance(self, done: int, **figures: float) -> None:
        """Move on; tokens are a running total and shown as a rate, other figures as they are."""
        if self._bar is None:
            return
        task = self._bar.tasks[0]
        elapsed = max(task.elapsed or 0.0, 1e-9)
        shown = [f"{(task.completed + done) / elapsed:,.1f}/s"]
        for name, value in figures.items():
            shown.append(f"{value / elapsed:,.0f} tokens/s" if name == "tokens" else f"{name} {value:.4g}")
        of = "" if task.total is None else f"/{task.total:,.0f}"
        counts = f"{task.completed + done:,.0f}{of} {task.fields['unit']}, {', '.join(shown)}"
        self._bar.update(task.id, advance=done, counts=counts)
        if not self._bar.console.is_terminal and time.monotonic() - self._logged >= _LOG_EVERY:
            self._logged = time.monotonic()
            self._bar.console.print(f"{task.description}: {counts}", soft_wrap=True)

    def finish(self) -> None:
        """End the bar and leave it on the screen."""
        if self._bar is not None:
            task = self._bar.tasks[0]
            if task.total is None:  # full now
                self._bar.update(task.id, total=max(task.completed, 1), completed=max(task.completed, 1))
            self._bar.stop()
            self._bar = None


def summary_text(summary: dict[str, Any]) -> str:
    """A summary as aligned lines; lists of texts get a line each, lists of mappings become tables."""
    width = max(len(name) for name in summary)
    lines = []
    for name, value in summary.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            lines += [
                f"{name:>{width}}:",
                *table_lines([{key: _inline(item) for key, item in row.items()} for row in value]),
            ]
        elif isinstance(value, list | tuple) and value and isinstance(value[0], str):
            lines.append(f"{name:>{width}}:")
            lines += [f"{'':>{width}}  {_inline(item)}" for item in value]
        else:
            lines.append(f"{name:>{width}}: {_inline(value)}")
    return "\n".join(lines)


def table_lines(rows: Sequence[dict[str, str]]) -> list[str]:
    """At least one mapping, all with the same keys, as an aligned table."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = ["  ".join(key.rjust(width) for key, width in widths.items())]
    lines += ["  ".join(row[key].rjust(width) for key, width in widths.items()) for row in rows]
    return [f"    {line}" for line in lines]


def _inline(value: Any) -> str:
    match value:
        case {"value": middle, "low": low, "high": high}:
            return f"{_inline(middle)} ({_inline(low)} to {_inline(high)})" if low != high else _inline(middle)
        case dict():
            return ", ".join(f"{name} {_inline(item)}" for name, item in value.items()) or "none"
        case list() | tuple():
            return ", ".join(_inline(item) for item in value) or "none"
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int() if abs(value) < 10**10:
            return f"{value:,}"
        case int():
            return f"{value:.4g}"
        case float():
            return f"{value:,.0f}" if 1000 <= abs(value) < 1e10 else f"{value:.4g}"
        case _:
            return str(value)


def pair_text(pair: RankedPair, width: int) -> str:
    """A ranked pair on four lines; each text is cut to `width` characters, 0 for no limit."""
    figures = f"score {pair.score:+.4f}  percentile {pair.percentile:.2f}  row {pair.row}"
    lines = [f"#{pair.rank}  {figures}  {pair.source}".rstrip()]
    for side in ("prompt", "chosen", "rejected"):
        lines.append(f"  {side:>8}: {shorten(getattr(pair, side), width)}")
    return "\n".join(lines)


def shorten(text: Any, width: int) -> str:
    """A text, or a list of messages, on one line and cut to `width` characters, 0 for no limit."""
    if isinstance(text, list):
        text = " ".join(f"[{message.get('role')}] {message.get('content')}" for message in text)
    flat = " ".join(str(text).split())
    return flat if not width or len(flat) <= width else flat[: width - 1] + "…"


def sources_table(shares: Sequence[SourceShare]) -> str:
    """Sources as an aligned table, in the order given."""
    names = [share.source or "(none)" for share in shares]
    name = max(len(text) for text in ("source", *names))
    lines = [
        f"{'source':<{name}} {'rows':>9} {'of data':>8} {'in top':>7} {'of top':>8} {'(interval)':>15} "
        f"{'lift':>6} {'(interval)':>15} {'rate':>8} {'(interval)':>15}"
    ]
    for source, share in zip(names, shares, strict=True):
        top, lift, rate = share.share_of_top_interval, share.lift_interval, share.rate_interval
        lines.append(
            f"{source:<{name}} {share.rows:>9,} {share.share_of_data:>8.2%} {share.top_rows:>7,} "
            f"{share.share_of_top:>8.2%} {f'({top[0]:.1%} - {top[1]:.1%})':>15} "
            f"{share.lift:>6.2f} {f'({lift[0]:.2f} - {lift[1]:.2f})':>15} "
            f"{share.rate:>8.2%} {f'({rate[0]:.1%} - {rate[1]:.1%})':>15}"
        )
    return "\n".join(lines)


def costs_table(lines: Sequence[CostLine]) -> str:
    """Costs as an aligned table, in the order given."""
    rows = [
        {
            "method": line.method,
            "stage": line.stage,
            "runs": str(line.runs),
            "wall s": f"{line.wall_seconds:,.1f}",
            "device s": f"{line.device_seconds:,.1f}",
            "tokens": f"{line.model_tokens:,}",
            "FLOPs": f"{line.flops:.3g}",
            "peak MiB": f"{line.peak_memory_bytes / 2**20:,.0f}",
            "API tokens": f"{line.api_prompt_tokens:,} + {line.api_completion_tokens:,}",
            "money": f"{line.money:,.4f}",
        }
        for line in lines
    ]
    return "\n".join(table_lines(rows)) if rows else "no costs recorded"
