"""The command that tells before any retraining whether an edit is likely to work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pairtrace.options import Behavior, Device, Json, Scores, Split, settings
from pairtrace.terminal import Answer, progress

if TYPE_CHECKING:
    from pairtrace.engine.diagnosis.diagnose import Diagnosis

app = typer.Typer()


@app.command("diagnose", epilog="Example: pairtrace diagnose scores.parquet --behavior compliance")
def _diagnose(
    scores: Scores,
    behavior: Behavior = None,
    store: Annotated[str | None, typer.Option(help="Activation store [default: recorded].")] = None,
    directions: Annotated[str | None, typer.Option(help="Direction file [default: recorded].")] = None,
    rollouts: Annotated[
        str | None, typer.Option(help="Rollouts of the behaviour, to be read again for a bootstrap over them.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model that reads --rollouts [default: recorded].")] = None,
    data: Annotated[str | None, typer.Option(help="Preference data, for lengths where there is no store.")] = None,
    split: Split = None,
    k: Annotated[int | None, typer.Option("-k", help="Size of the top [default: 5 % of the ranked pairs].")] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap samples.")] = 100,
    null_directions: Annotated[int, typer.Option(help="Random directions of each kind.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of random directions and bootstrap.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> Answer:
    """Tell whether editing the top of a ranking is likely to work: concentrated, mixed, diffuse or undecided."""
    options = settings(locals())
    from pairtrace.engine.diagnosis.config import DiagnoseConfig
    from pairtrace.engine.diagnosis.diagnose import diagnose

    found = diagnose(DiagnoseConfig(**options), progress())
    return Answer(found.to_dict(), json, text=diagnosis_text(found))


def diagnosis_text(found: Diagnosis) -> str:
    """The verdict, a table of findings with their advice, and what was not measured."""
    head = f"{found.behavior} ({found.method}), {found.pairs:,} ranked pairs, top {found.k:,}"
    rows = [("figure", "value", "threshold", "says")]
    rows += [(one.figure, one.value, one.threshold, one.says) for one in found.findings]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [head, f"verdict: {found.verdict}", f"  {found.reason}", ""]
    for row, advice in zip(rows, ("", *(one.advice for one in found.findings)), strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if advice:
            lines.append(f"    {advice}")
    absent = _absent(found.to_dict())
    if absent:
        lines += ["", "not measured:", *(f"  {name}: {why}" for name, why in absent)]
    return "\n".join(lines)


def _absent(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and reasons of the figures that were not measured, each reason once."""
    found: dict[str, list[str]] = {}
    for name, value in figures.items():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, dict) and "not_measured" in one:
                found.setdefault(one["not_measured"], []).append(name)
    return [(", ".join(names), why) for why, names in found.items()]
