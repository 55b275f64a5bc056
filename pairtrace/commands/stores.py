"""Commands that look into an activation store or make another one of it."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.options import Json
from pairtrace.terminal import Answer, progress, summary_text

app = typer.Typer(
    help="Look into an activation store, check it, convert it.", no_args_is_help=True, rich_markup_mode=None
)


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
        f"mark of a damaged shard (status/c/N), which has its rows made again, and {report.advice}"
    )
    return Answer(
        {**figures, "missing_shards": missing, "problems": problems}, json, error=None if report.ok else advice
    )


@app.command(
    "convert", epilog="Example: pairtrace store convert acts.zarr small.zarr --dtype int8 --directions b.safetensors"
)
def _store_convert(
    source: Annotated[str, typer.Argument(help="Activation store, complete.", metavar="SRC")],
    out: Annotated[str, typer.Argument(help="Activation store to make or resume.", metavar="DST")],
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of its rows: float16, bfloat16, float32, int8 [default: as SRC].")
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="Compression of its rows: none, zstd:LEVEL, blosc-lz4:LEVEL, blosc-zstd:LEVEL [default: as SRC]."
        ),
    ] = None,
    directions: Annotated[
        list[str] | None, typer.Option(help="Direction file for the report of fidelity; may be repeated.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer of the report [default: all common ones].")] = None,
    fsync: Annotated[bool, typer.Option(help="Force each shard to disk before it is marked.")] = True,
    json: Json = False,
) -> Answer:
    """Write a store in another dtype or codec, and report how well its scores agree with those before."""
    from pairtrace.engine.convert import ConvertConfig, convert

    config = ConvertConfig(
        source=source,
        out=out,
        dtype=dtype,
        codec=codec,
        directions=tuple(directions or ()),
        layer=layer,
        fsync=fsync,
    )
    summary = convert(config, progress())
    return Answer(summary.to_dict(), json, text=summary_text(summary.to_rounded_dict()))
