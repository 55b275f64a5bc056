"""Commands that look into an activation store."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.options import Json
from pairtrace.terminal import Answer, progress

app = typer.Typer(help="Look into an activation store and check it.", no_args_is_help=True, rich_markup_mode=None)


@app.command("info", epilog="Example: pairtrace store info acts.zarr")
def _store_info(store: Annotated[str, typer.Argument(help="Activation store.")], json: Json = False) -> Answer:
    """Show what a store was made from and how far it is."""
    from pairtrace.store.reader import ActivationStore

    opened = ActivationStore.open(store, allow_incomplete=True)
    return Answer({"store": store, **opened.summary(), **opened.manifest.to_json()}, json)


@app.command("verify", epilog="Example: pairtrace store verify acts.zarr")
def _store_verify(store: Annotated[str, typer.Argument(help="Activation store.")], json: Json = False) -> Answer:
    """Read every byte of a store and check it: checksums, norms, status. Exit code 1 when anything is wrong."""
    from pairtrace.store.verify import verify

    report = verify(store, progress())
    problems = [str(problem) for problem in report.problems]
    missing = len(report.missing_shards)
    figures = {"store": store, "ok": report.ok, "rows": report.rows, "shards": report.shards}
    advice = (
        f"{store}: problems found: {len(problems)}, shards missing: {missing} of {report.shards}; delete the "
        "mark of a damaged shard (status/c/N) and run the extraction again: it computes what has no mark"
    )
    return Answer(
        {**figures, "missing_shards": missing, "problems": problems}, json, error=None if report.ok else advice
    )
