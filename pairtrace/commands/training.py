"""The command that trains a checkpoint on preference data."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from pairtrace.options import (
    Column,
    Device,
    Format,
    Json,
    Limit,
    MaxLength,
    Split,
    Template,
    TemplateDate,
    Truncation,
    settings,
)
from pairtrace.terminal import Answer, progress, summary_text

logger = logging.getLogger("pairtrace")

app = typer.Typer()

_ABOUT = """last_loss and last_accuracy are means over the last tenth of the log, not values of the last step;
tokens, flops and seconds are this process's, all_processes adds those of interrupted ones"""


@app.command("train", epilog="Example: pairtrace train ./sft-checkpoint clean.parquet --out ./dpo-clean --seed 1")
def _train(
    model: Annotated[str, typer.Argument(help="Checkpoint to train (M0): directory or hub id. It is the reference.")],
    data: Annotated[str, typer.Argument(help="Preference data: jsonl(.gz), json, parquet, a directory or a hub id.")],
    out: Annotated[str, typer.Option(help="Directory of the trained checkpoint (M1); it appears when complete.")],
    lora: Annotated[int | None, typer.Option(help="Train an adapter of this rank [default: all weights].")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of the adapter [default: twice the rank].")] = None,
    lora_target: Annotated[
        list[str] | None, typer.Option(help="Module with an adapter; may be repeated [default: all linear ones].")
    ] = None,
    merge: Annotated[bool, typer.Option(help="Write the model with the adapter merged in, and the adapter.")] = True,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate [default: 5e-7, with an adapter 1e-5].")
    ] = None,
    beta: Annotated[float, typer.Option(help="Strength of the pull towards M0.")] = 0.1,
    loss_type: Annotated[
        list[str] | None, typer.Option(help="Loss of TRL's DPO trainer; may be repeated [default: sigmoid].")
    ] = None,
    loss_weight: Annotated[list[float] | None, typer.Option(help="Weight of each loss [default: 1 each].")] = None,
    label_smoothing: Annotated[float, typer.Option(help="Of the losses robust and exo_pair.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Passes over the pairs.")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs per optimizer step.")] = 32,
    accumulation: Annotated[int, typer.Option(help="Forward passes that the pairs of a step are spread over.")] = 1,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.1,
    scheduler: Annotated[str, typer.Option(help="Rate after the warm-up: linear, cosine or constant.")] = "linear",
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0,
    adam_beta1: Annotated[float, typer.Option(help="First beta of AdamW.")] = 0.9,
    adam_beta2: Annotated[float, typer.Option(help="Second beta of AdamW.")] = 0.999,
    adam_epsilon: Annotated[float, typer.Option(help="Epsilon of AdamW.")] = 1e-8,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this norm; 0 for never.")] = 1.0,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Batches of pairs of similar length, in random order.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order and of the adapter's first weights.")] = 0,
    data_seed: Annotated[int | None, typer.Option(help="Seed of the order alone [default: --seed].")] = None,
    compute_dtype: Annotated[
        str, typer.Option(help="Forward pass: auto (bfloat16 on GPUs that have it), float32 or bfloat16.")
    ] = "auto",
    save_dtype: Annotated[str, typer.Option(help="Written weights: auto (M0's own), float32 or bfloat16.")] = "auto",
    device: Device = "auto",
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Save memory for a fourth more time [default: from a billion weights on a GPU].")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the training [default: PyTorch's].")] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints to resume from; 0 for none.")] = 500,
    reference_cache: Annotated[
        str | None,
        typer.Option(help="Directory of M0's log-probabilities [default: .pairtrace-reference beside --out]."),
    ] = None,
    monitor: Annotated[
        str | None, typer.Option(help="Prompts to ask while training: what changes? Logged to OUT.monitor.")
    ] = None,
    monitor_steps: Annotated[int, typer.Option(help="Steps between two looks of the monitor.")] = 50,
    monitor_rules: Annotated[
        str | None, typer.Option(help="Rule file of the monitor's judge, or refusal [default: no judge].")
    ] = None,
    monitor_known: Annotated[str | None, typer.Option(help="Clusters that `pairtrace discover prompts` found.")] = None,
    monitor_stop: Annotated[bool, typer.Option("--monitor-stop", help="End training at an alert.")] = False,
    max_length: MaxLength = 1024,
    truncation: Truncation = "keep_start",
    limit: Limit = None,
    format: Format = None,
    prompt: Column = None,
    chosen: Column = None,
    rejected: Column = None,
    source: Column = None,
    split: Split = None,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    json: Json = False,
) -> Answer:
    """Train a checkpoint with DPO on the tokens that extraction reads. Resumes where it stopped."""
    options = settings(
        locals(),
        max_length=max_length or None,
        loss_type=tuple(loss_type or ("sigmoid",)),
        loss_weights=tuple(loss_weight or ()),
        lora_targets=tuple(lora_target or ()),
    )
    del options["loss_weight"], options["lora_target"]
    from pairtrace.engine.training.config import TrainConfig
    from pairtrace.engine.training.train import train

    summary = train(TrainConfig(**options), progress())
    if summary.already_complete:
        logger.info("%s is already trained with these settings: nothing to do", out)
    figures = summary.to_dict()
    return Answer(figures, json, text=f"{summary_text(figures)}\n{_ABOUT}")
