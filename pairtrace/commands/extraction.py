"""Commands that turn preference data into an activation store, and the demonstration."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from pairtrace.options import (
    Backend,
    CacheGib,
    Codec,
    Column,
    ComputeDtype,
    Data,
    DataParallel,
    Device,
    EngineOption,
    Format,
    Json,
    Layers,
    Limit,
    MaxLength,
    Split,
    StoreDtype,
    Template,
    TemplateDate,
    TensorParallel,
    TokenBudget,
    Truncation,
    engine_settings,
    numbers,
    settings,
)
from pairtrace.terminal import Answer, progress

logger = logging.getLogger("pairtrace")

app = typer.Typer()


@app.command(
    "extract", epilog="Example: pairtrace extract prefs.jsonl --model ./sft-checkpoint --layers 20 --store acts.zarr"
)
def _extract(
    data: Data,
    model: Annotated[str, typer.Option(help="Checkpoint from before preference training (M0): directory or hub id.")],
    layers: Layers,
    store: Annotated[str, typer.Option(help="Activation store to make or resume.")],
    sides: Annotated[bool, typer.Option("--sides", help="Keep the means of chosen and rejected too.")] = False,
    dtype: StoreDtype = "float16",
    codec: Codec = "none",
    compute_dtype: ComputeDtype = "auto",
    device: Device = "auto",
    max_length: MaxLength = 1024,
    truncation: Truncation = "keep_start",
    token_budget: TokenBudget = None,
    shard_rows: Annotated[int | None, typer.Option(help="Rows per shard [default: 64 to 2048 by size].")] = None,
    reuse: Annotated[list[str] | None, typer.Option(help="Store to copy known pairs from; may be repeated.")] = None,
    limit: Limit = None,
    format: Format = None,
    prompt: Column = None,
    chosen: Column = None,
    rejected: Column = None,
    source: Column = None,
    split: Split = None,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    fsync: Annotated[bool, typer.Option(help="Force each shard to disk before it is marked.")] = True,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler whose workers compute the shards.")
    ] = None,
    backend: Backend = "hf",
    tensor_parallel: TensorParallel = None,
    data_parallel: DataParallel = None,
    cache_gib: CacheGib = None,
    engine_option: EngineOption = None,
    json: Json = False,
) -> Answer:
    """Run a checkpoint over every pair once and keep its mean response activations. Resumes where it stopped."""
    options = settings(
        engine_settings(locals()), layers=numbers(layers), max_length=max_length or None, reuse=tuple(reuse or ())
    )
    from pairtrace.engine.extract import ExtractConfig, extract

    summary = extract(ExtractConfig(**options), progress())
    if summary.already_complete:
        logger.info("%s already holds all %s rows of this data: nothing to do", store, f"{summary.rows:,}")
    nothing = f"every row was quarantined ({summary.reasons}): the store has nothing to score"
    return Answer(summary.to_dict(), json, error=nothing if summary.ok == 0 else None)


@app.command("plan", epilog="Example: pairtrace plan prefs.jsonl --model ./sft --layers 20 --gpu H100 --price 2.50")
def _plan(
    data: Data,
    model: Annotated[str, typer.Option(help="Checkpoint; only its configuration and tokenizer are read.")],
    layers: Layers,
    gpu: Annotated[str | None, typer.Option(help="GPU, for its peak: H200, H100, A100, L40S and others.")] = None,
    gpu_flops: Annotated[float | None, typer.Option(help="Peak FLOP/s, instead of --gpu.")] = None,
    mfu: Annotated[
        float, typer.Option("--utilisation", help="Share of the peak that is reached: an assumption.")
    ] = 0.4,
    price_per_hour: Annotated[float | None, typer.Option("--price", help="Price of an hour of that GPU.")] = None,
    sample: Annotated[int, typer.Option(help="Rows to tokenise for the estimate; 0 for all.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    sides: Annotated[bool, typer.Option("--sides", help="Plan for a store with both sides.")] = False,
    dtype: StoreDtype = "float16",
    max_length: MaxLength = 1024,
    truncation: Truncation = "keep_start",
    chat_template: Template = None,
    template_date: TemplateDate = None,
    limit: Limit = None,
    format: Format = None,
    prompt: Column = None,
    chosen: Column = None,
    rejected: Column = None,
    source: Column = None,
    split: Split = None,
    json: Json = False,
) -> Answer:
    """Estimate tokens, FLOPs, store size, hours and money before any run."""
    options = settings(locals(), layers=numbers(layers), max_length=max_length or None, sample=sample or None)
    from pairtrace.engine.plan import PlanConfig, plan

    summary = plan(PlanConfig(**options), progress()).to_dict()
    if not json:
        # The two procedures side by side read best as the rows of one table.
        summary["procedures"] = [summary.pop("pairtrace"), summary.pop("published")]
    return Answer(summary, json)


@app.command("demo", epilog="Example: pairtrace demo --out demo --seed 1 --json")
def _demo(
    out: Annotated[
        str, typer.Option(help="Directory for everything; finished stages in it are kept.")
    ] = ".pairtrace-demo",
    seed: Annotated[int, typer.Option(help="Seed of the organism.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads of the training [default: PyTorch's].")] = None,
    json: Json = False,
) -> Answer:
    """Train a tiny model that learns a bad habit from planted pairs, and find those pairs."""
    from pairtrace.engine.demo import DemoConfig, run_demo
    from pairtrace.engine.organism.config import OrganismConfig
    from pairtrace.terminal import pair_text, sources_table, summary_text

    summary = run_demo(DemoConfig(out=out, organism=OrganismConfig(seed=seed, threads=threads)), progress())
    figures = summary.to_dict()
    if json:
        return Answer(figures, json)
    for part in ("top", "sources"):
        del figures[part]
    pairs = "\n".join(pair_text(pair, 200) for pair in summary.top)
    text = f"The pairs that the ranking blames first:\n\n{pairs}\n\n{sources_table(summary.sources)}\n"
    return Answer(figures, json, text=f"{text}\n{summary_text(figures)}")
