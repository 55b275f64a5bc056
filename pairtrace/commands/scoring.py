"""Commands that make behaviour directions, score a store against them and read the ranking."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.options import (
    Behavior,
    CacheGib,
    DataParallel,
    Device,
    EngineOption,
    Json,
    RolloutBackend,
    Scores,
    Split,
    Template,
    TemplateDate,
    TensorParallel,
    TokenBudget,
    numbers,
    rollout_settings,
    settings,
)
from pairtrace.terminal import Answer, progress

app = typer.Typer()


@app.command(
    "behavior",
    epilog="Example: pairtrace behavior prompts.yaml --base ./sft --tuned ./dpo --store acts.zarr --out b.safetensors",
)
def _behavior(
    base: Annotated[str, typer.Option(help="Checkpoint from before preference training (M0).")],
    out: Annotated[str, typer.Option(help="Direction file to write (.safetensors); rollouts are kept beside it.")],
    prompts: Annotated[str | None, typer.Argument(help="Behaviour prompts, yaml or jsonl.")] = None,
    tuned: Annotated[str | None, typer.Option(help="Checkpoint after preference training (M1).")] = None,
    rollouts: Annotated[str | None, typer.Option(help="Start from these rollouts instead of sampling.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of --rollouts that holds the verdicts.")] = None,
    rules: Annotated[str | None, typer.Option(help="Rule file of the judge [default: refusal, built in].")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the behaviour [default: the stem of --out].")] = None,
    kinds: Annotated[str, typer.Option("--kind", help="mean (one vector), bank (one per scenario) or both.")] = "both",
    layers: Annotated[str | None, typer.Option(help="Residual layers [default: those of --store, or all].")] = None,
    store: Annotated[str | None, typer.Option(help="Activation store that the direction is meant for.")] = None,
    max_base_rate: Annotated[float, typer.Option(help="Rate of the behaviour allowed in the other conditions.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.7,
    samples: Annotated[int | None, typer.Option(help="Rollouts per prompt and cell [default: 8; greedy 1].")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Rollouts per batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option("--compute-dtype", help="Dtype of the forward passes.")] = "auto",
    max_length: Annotated[int | None, typer.Option(help="As for extraction [default: as --store, or 1024].")] = None,
    truncation: Annotated[str | None, typer.Option(help="As for extraction [default: as --store].")] = None,
    token_budget: TokenBudget = None,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    backend: RolloutBackend = "auto",
    tensor_parallel: TensorParallel = None,
    data_parallel: DataParallel = None,
    cache_gib: CacheGib = None,
    engine_option: EngineOption = None,
    json: Json = False,
) -> Answer:
    """Sample both checkpoints, judge, filter, and turn what changed into directions."""
    options = settings(
        rollout_settings(locals()),
        layers=None if layers is None else numbers(layers),
        samples=samples if samples is not None else 8 if temperature else 1,
    )
    from pairtrace.engine.behavior import BehaviorConfig, build_behavior

    return Answer(build_behavior(BehaviorConfig(**options), progress()).to_dict(), json)


@app.command("score", epilog="Example: pairtrace score acts.zarr b.safetensors --out scores.parquet")
def _score(
    store: Annotated[str, typer.Argument(help="Activation store.")],
    behaviors: Annotated[list[str], typer.Argument(help="Direction files: .safetensors or .npy.")],
    out: Annotated[str, typer.Option(help="Scores table to write (.parquet).")],
    layer: Annotated[int | None, typer.Option(help="Residual layer [default: the deepest common one].")] = None,
    allow_incomplete: Annotated[bool, typer.Option("--allow-incomplete", help="Score the finished rows.")] = False,
    checksum: Annotated[bool, typer.Option(help="Compare the checksum of every shard that is read.")] = True,
    keep_top: Annotated[
        int | None, typer.Option(help="Keep the best rows of each behaviour only, for thousands of behaviours.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler whose workers score the shards.")
    ] = None,
    json: Json = False,
) -> Answer:
    """Score every pair against behaviour directions: cosine, or the maximum over a bank."""
    from pairtrace.engine.score import ScoreConfig, score

    config = ScoreConfig(
        store=store,
        directions=tuple(behaviors),
        out=out,
        layer=layer,
        allow_incomplete=allow_incomplete,
        checksum=checksum,
        keep_top=keep_top,
        scheduler=scheduler,
    )
    return Answer(score(config, progress()).to_dict(), json)


@app.command("top", epilog="Example: pairtrace top scores.parquet --data prefs.jsonl -k 5")
def _top(
    scores: Scores,
    data: Annotated[
        str | None, typer.Option(help="Preference data [default: the path the store was made from].")
    ] = None,
    behavior: Behavior = None,
    k: Annotated[int, typer.Option("-k", help="Pairs from each end.")] = 10,
    end: Annotated[str, typer.Option(help="Which end of the ranking: both, top or bottom.")] = "both",
    width: Annotated[int, typer.Option(help="Characters of each text to show; 0 for all.")] = 400,
    split: Split = None,
    json: Json = False,
) -> Answer:
    """Print the pairs behind the ranks."""
    from pairtrace.engine.ranking import top
    from pairtrace.terminal import pair_text

    pairs = top(scores, data=data, behavior=behavior, k=k, ends=end, split=split)  # type: ignore[arg-type]
    text = "\n".join(pair_text(pair, width) for pair in pairs)
    return Answer({"pairs": [pair.to_dict() for pair in pairs]}, json, text=text)


@app.command("sources", epilog="Example: pairtrace sources scores.parquet -k 1000")
def _sources(
    scores: Scores,
    behavior: Behavior = None,
    k: Annotated[int | None, typer.Option("-k", help="Size of the top [default: 1 % of the rows].")] = None,
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    json: Json = False,
) -> Answer:
    """Show each source's share of the top of the ranking, with intervals, against its share of the data."""
    from pairtrace.engine.ranking import sources
    from pairtrace.terminal import sources_table

    shares = sources(scores, behavior=behavior, k=k, confidence=confidence)
    return Answer({"sources": [share.to_dict() for share in shares]}, json, text=sources_table(shares))
