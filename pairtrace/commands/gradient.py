"""The command of the gradient baseline."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.commands.baselines import Base, BaselineName, BaselineOut, BaselineStore, StoreData
from pairtrace.options import ComputeDtype, Device, Json, Template, TokenBudget, settings
from pairtrace.terminal import Answer, progress

app = typer.Typer()


@app.command(
    "gradient",
    epilog="Example: pairtrace baseline gradient acts.zarr --rollouts b.rollouts.parquet --out gradient.parquet",
)
def _gradient(
    store: BaselineStore,
    out: BaselineOut,
    target: Annotated[
        str | None, typer.Option(help="Preference data whose chosen sides show the behaviour, rejected do not.")
    ] = None,
    rollouts: Annotated[
        str | None, typer.Option(help="Instead of --target: rollouts that `pairtrace behavior` wrote.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of --rollouts that holds the verdicts.")] = None,
    max_base_rate: Annotated[
        float, typer.Option(help="Of --rollouts: rate of the behaviour allowed in the other conditions.")
    ] = 0.0,
    target_mean: Annotated[
        str | None, typer.Option(help="Of target directions or gradients [default: directions; tracin gradients].")
    ] = None,
    target_limit: Annotated[int | None, typer.Option(help="At most this many target pairs [default: all].")] = None,
    name: BaselineName = "gradient",
    work: Annotated[
        str | None,
        typer.Option(help="Directory of checkpoints and gradients; another target may reuse it [default: by --out]."),
    ] = None,
    base: Base = None,
    data: StoreData = None,
    procedure: Annotated[
        str, typer.Option(help="batched (fast), or published (one pair at a time, reference never kept).")
    ] = "batched",
    score: Annotated[str, typer.Option(help="cosine (LESS) or tracin (unprojected dot products).")] = "cosine",
    checkpoints: Annotated[int, typer.Option(help="Checkpoints of the warm-up, one after each epoch.")] = 4,
    preconditioner: Annotated[
        str | None, typer.Option(help="Of the pairs' gradients: adam or none [default: adam; tracin none].")
    ] = None,
    projection: Annotated[
        int | None, typer.Option(help="Dimensions of the random projection; 0 for none [default: 8192; tracin 0].")
    ] = None,
    beta: Annotated[float, typer.Option(help="Of the DPO loss.")] = 0.1,
    length_normalized: Annotated[
        bool, typer.Option("--length-normalized", help="Log-probabilities per response token.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="Scale of the adapter, times its rank.")] = 16.0,
    warmup_share: Annotated[float, typer.Option(help="Share of the pairs that the warm-up trains on.")] = 0.05,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the warm-up.")] = 1e-4,
    batch_pairs: Annotated[int, typer.Option(help="Pairs per step of the warm-up.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of adapter, warm-up and projection.")] = 0,
    device: Device = "auto",
    compute_dtype: ComputeDtype = "auto",
    token_budget: TokenBudget = None,
    chat_template: Template = None,
    shard_rows: Annotated[int, typer.Option(help="Rows kept together, the unit of resumption.")] = 512,
    json: Json = False,
) -> Answer:
    """Rank by the gradient of each pair's DPO loss (LESS for DPO), after a warm-up of a LoRA adapter."""
    options = settings(locals())
    from pairtrace.engine.baselines.gradient import GradientConfig, gradient_baseline

    return Answer(gradient_baseline(GradientConfig(**options), progress()).to_dict(), json)
