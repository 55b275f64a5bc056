"""The command that discovers what training changed among prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.commands.discovery_options import (
    ApiKeyEnv,
    BaseUrl,
    Exemplars,
    Fdr,
    JudgeModel,
    Metadata,
    StabilityItems,
    StabilityRuns,
    StoreData,
    TopDatapoints,
    description_config,
)
from pairtrace.commands.discovery_show import discovery_answer
from pairtrace.options import Device, Json, Template, TemplateDate, TokenBudget, settings
from pairtrace.terminal import Answer, progress

app = typer.Typer()


@app.command(
    "prompts",
    epilog="Example: pairtrace discover prompts acts.zarr --base ./sft --tuned ./dpo --prompts bag.jsonl --out ./found",
)
def _prompts(
    store: Annotated[str, typer.Argument(help="Activation store of M0.")],
    base: Annotated[str, typer.Option(help="Checkpoint from before preference training (M0).")],
    out: Annotated[str, typer.Option(help="Directory to write; an interrupted run goes on there.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Bag of prompts of any kind, yaml or jsonl; one with a distractor is asked without and with it."
        ),
    ] = None,
    tuned: Annotated[str | None, typer.Option(help="Checkpoint after preference training (M1).")] = None,
    rollouts: Annotated[str | None, typer.Option(help="Start from these rollouts instead of sampling.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of --rollouts that holds the verdicts.")] = None,
    rules: Annotated[str | None, typer.Option(help="Rule file of the judge [default: refusal, built in].")] = None,
    layer: Annotated[int | None, typer.Option(help="Residual layer [default: the deepest of the store].")] = None,
    min_cluster_size: Annotated[
        int | None, typer.Option(help="Prompts that make a cluster [default: by their number, at least 8].")
    ] = None,
    min_samples: Annotated[
        int, typer.Option(help="The density at a prompt is read at this neighbour; more smooth it.")
    ] = 5,
    dimensions: Annotated[int, typer.Option(help="Axes of the cosine matrix that are clustered.")] = 10,
    flag_fdr: Annotated[float, typer.Option(help="Share of false discoveries allowed among flagged clusters.")] = 0.05,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    samples: Annotated[int, typer.Option(help="Answers per prompt and model.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Rollouts per batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of sampling, clustering and bootstrap.")] = 0,
    exemplars: Exemplars = 5,
    top_datapoints: TopDatapoints = 10,
    metadata: Metadata = None,
    data: StoreData = None,
    fdr: Fdr = 0.05,
    stability_runs: StabilityRuns = 20,
    stability_items: StabilityItems = 20_000,
    base_url: BaseUrl = None,
    model: JudgeModel = None,
    api_key_env: ApiKeyEnv = None,
    allow_incomplete: Annotated[bool, typer.Option("--allow-incomplete", help="Take the finished rows.")] = False,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler [default: processes on this machine].")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option("--compute-dtype", help="Dtype of the forward passes.")] = "auto",
    token_budget: TokenBudget = None,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    json: Json = False,
) -> Answer:
    """Group prompts whose answers changed alike, and flag groups where the verdicts changed. Needs no labels."""
    options = settings(locals())
    from pairtrace.engine.discovery.prompts_view import PromptsConfig, discover_prompts

    description = description_config(options)
    return discovery_answer(discover_prompts(PromptsConfig(**options, description=description), progress()), json)
