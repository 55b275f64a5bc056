"""The command that measures and compares models."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.options import (
    CacheGib,
    DataParallel,
    Device,
    EngineOption,
    Format,
    Json,
    RolloutBackend,
    Split,
    Template,
    TemplateDate,
    TensorParallel,
    rollout_settings,
    settings,
)
from pairtrace.terminal import Answer, progress

app = typer.Typer()


@app.command(
    "evaluate", epilog="Example: pairtrace evaluate prompts.jsonl ./sft ./dpo --base ./sft --data held-out.jsonl"
)
def _evaluate(
    prompts: Annotated[
        str, typer.Argument(help="Prompts, yaml or jsonl; an entry may have the keys cell, benign and constraint.")
    ],
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Checkpoints; differences are from the first one.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Report to write (.json); responses and costs go beside it, a rerun goes on.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="M0: measure drift and implicit rewards against this checkpoint.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Held-out preference pairs: measure the accuracy on them.")] = None,
    rollouts: Annotated[str | None, typer.Option(help="Responses that exist already, instead of sampling.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of --rollouts that holds the verdicts.")] = None,
    rules: Annotated[str | None, typer.Option(help="Rule file of the judge [default: refusal, built in].")] = None,
    refusal_rules: Annotated[
        str | None, typer.Option(help="Rule file that tells refusals on benign prompts [default: refusal, built in].")
    ] = None,
    conditions: Annotated[
        str | None, typer.Option(help="plain, distractor or plain,distractor [default: as the prompts say].")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    samples: Annotated[int, typer.Option(help="Responses per request; more than one needs a temperature.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Responses per batch.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the sampling and of the bootstrap.")] = 0,
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    replicates: Annotated[int, typer.Option(help="Replicates of the bootstrap.")] = 2000,
    drift: Annotated[bool, typer.Option(help="With --base: measure the KL divergence from it.")] = True,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option("--compute-dtype", help="Dtype of the forward passes.")] = "auto",
    max_length: Annotated[int, typer.Option(help="Longest pair of --data in tokens; 0 for no limit.")] = 1024,
    truncation: Annotated[str, typer.Option(help="Which end of a longer pair stays: keep_start or keep_end.")] = (
        "keep_start"
    ),
    token_budget: Annotated[int, typer.Option(help="Tokens per forward pass of drift and preferences.")] = 4096,
    format: Format = None,
    split: Split = None,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Capability tasks, comma-separated; needs the extra lm-eval.")
    ] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(help="Examples per capability task [default: all].")] = None,
    backend: RolloutBackend = "auto",
    tensor_parallel: TensorParallel = None,
    data_parallel: DataParallel = None,
    cache_gib: CacheGib = None,
    engine_option: EngineOption = None,
    json: Json = False,
) -> Answer:
    """Let models answer, and report behaviour, over-refusal, helpfulness, format, preferences and drift."""
    options = settings(
        rollout_settings(locals()),
        models=tuple(models or ()),
        conditions=None if conditions is None else tuple(conditions.split(",")),
        lm_eval=() if lm_eval is None else tuple(lm_eval.split(",")),
    )
    from pairtrace.engine.evaluation.config import EvaluateConfig
    from pairtrace.engine.evaluation.evaluate import evaluate

    found = evaluate(EvaluateConfig(**options), progress())
    return Answer(found.to_dict(), json, text=found.to_text())
