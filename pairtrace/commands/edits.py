"""Commands that change preference data by a ranking, and undo it."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.errors import ConfigError
from pairtrace.options import Behavior, Json, Scores, Split
from pairtrace.terminal import Answer, progress

app = typer.Typer()


@app.command("edit", epilog="Example: pairtrace edit prefs.jsonl scores.parquet --filter -k 1000 --out clean.parquet")
def _edit(
    data: Annotated[str, typer.Argument(help="The preference data that the scores rank.")],
    scores: Scores,
    out: Annotated[str, typer.Option(help="Edited data to write (.parquet); the change record goes beside it.")],
    filter: Annotated[bool, typer.Option("--filter", help="Remove the selected pairs.")] = False,
    swap: Annotated[bool, typer.Option("--swap", help="Exchange chosen and rejected of the selected pairs.")] = False,
    drop_sources: Annotated[
        bool, typer.Option("--drop-sources", help="Remove sources that are over-represented among the selected pairs.")
    ] = False,
    behavior: Behavior = None,
    k: Annotated[int | None, typer.Option("-k", help="Select this many pairs from the top.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Select this share of the ranked pairs.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Select the pairs with at least this score.")] = None,
    fdr: Annotated[float | None, typer.Option(help="Select at this estimated share of false discoveries.")] = None,
    null: Annotated[
        str, typer.Option(help="Scores by chance, for --fdr: sign-flip or random (directions).")
    ] = "sign-flip",
    drop: Annotated[list[str] | None, typer.Option(help="With --drop-sources: this source; may be repeated.")] = None,
    by: Annotated[str | None, typer.Option(help="With --drop-sources: a column instead of the source.")] = None,
    min_lift: Annotated[
        float, typer.Option(help="With --drop-sources: share of the selected over share of the data (low end).")
    ] = 1.0,
    coverage: Annotated[
        float, typer.Option(help="With --drop-sources: enough when this share of the selected (by score) is gone.")
    ] = 0.9,
    store: Annotated[str | None, typer.Option(help="Activation store, for --null random [default: recorded].")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random directions.")] = 0,
    split: Split = None,
    json: Json = False,
) -> Answer:
    """Remove or swap the pairs that a ranking blames, or drop their sources. The data itself stays as it is."""
    from pairtrace.engine.edit import edit
    from pairtrace.engine.edit_config import EditConfig
    from pairtrace.engine.selection import SelectionRule

    actions = {"filter": filter, "swap": swap, "drop-sources": drop_sources}
    given = [name for name, wanted in actions.items() if wanted]
    if len(given) != 1:
        raise ConfigError(
            f"expected exactly one of --filter, --swap and --drop-sources, got {', '.join(given) or 'none'}"
        )
    limits = (k, fraction, threshold, fdr)
    rule = (
        None
        if drop and not any(limit is not None for limit in limits)
        else SelectionRule(k=k, fraction=fraction, threshold=threshold, fdr=fdr, null=null)  # type: ignore[arg-type]
    )
    config = EditConfig(
        scores=scores,
        out=out,
        action=given[0],  # type: ignore[arg-type]
        rule=rule,
        data=data,
        behavior=behavior,
        drop=tuple(drop or ()),
        by=by,
        min_lift=min_lift,
        coverage=coverage,
        store=store,
        seed=seed,
        split=split,
    )
    return Answer(edit(config, progress()).to_dict(), json)


@app.command("restore", epilog="Example: pairtrace restore clean.parquet --out original.parquet")
def _restore(
    edited: Annotated[str, typer.Argument(help="Data that `pairtrace edit` wrote.")],
    out: Annotated[str, typer.Option(help="Restored data to write (.parquet).")],
    changes: Annotated[str | None, typer.Option(help="Change record [default: the one beside the data].")] = None,
    json: Json = False,
) -> Answer:
    """Undo an edit: the rows as they were, in their order and schema."""
    from pairtrace.engine.restore import restore

    return Answer(restore(edited, out, changes, progress()).to_dict(), json)
