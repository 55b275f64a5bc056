"""The commands that fine-tune against probes, and report what that does to detectability."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from pairtrace.options import (
    Device,
    Json,
    MaxLength,
    Split,
    Template,
    TemplateDate,
    Truncation,
    numbers,
    settings,
)
from pairtrace.terminal import Answer, progress, summary_text, table_lines

logger = logging.getLogger("pairtrace")

app = typer.Typer()

_ABOUT = """probabilities are means over the responses of the first and of the last logged steps, as the model was then;
watched probes have no part in the training"""


@app.command(
    "finetune",
    epilog="Example: pairtrace finetune ./sft prompts.jsonl --method dpo --probe harm.safetensors --out ./less-harm",
)
def _finetune(
    model: Annotated[str, typer.Argument(help="Checkpoint to train (M0): directory or hub id.")],
    data: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS",
            help="dpo: prompts, yaml or jsonl. sft: prompts with given responses (prompt and completion, messages, or "
            "rollouts with response).",
        ),
    ],
    method: Annotated[
        str, typer.Option(help="sft: the probability of the probe in the loss; dpo: pairs that the probe makes.")
    ],
    out: Annotated[str, typer.Option(help="Directory of the trained checkpoint; it appears when complete.")],
    probe: Annotated[str | None, typer.Option(help="Probe file made by `pairtrace probe train`.")] = None,
    probe_layers: Annotated[
        str | None, typer.Option(help="Layers of the probes, comma-separated [default: the best one of the file].")
    ] = None,
    probe_weight: Annotated[float, typer.Option(help="sft: weight of the probability; 0 only looks.")] = 1.0,
    imitate_below: Annotated[
        float | None,
        typer.Option(
            help="sft: imitate only the given responses to which the probe gives less than this; the others have a "
            "part in the probe's term alone [default: imitate all]."
        ),
    ] = None,
    signal: Annotated[
        str, typer.Option(help="What is trained against: probe, or as a control classifier, judge or none.")
    ] = "probe",
    classifier: Annotated[
        str | None, typer.Option(help="Directory of a transformers sequence classifier, with --signal classifier.")
    ] = None,
    classifier_label: Annotated[
        str | None, typer.Option(help="Its label that stands for the behaviour [default: the last one].")
    ] = None,
    rules: Annotated[
        str | None, typer.Option(help="Rule file, with --signal judge [default: refusal, built in].")
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="sft with a control: responses that it gives this probability are left out.")
    ] = 0.5,
    min_gap: Annotated[
        float, typer.Option(help="dpo: leave out prompts whose lowest and highest probability differ by no more.")
    ] = 0.0,
    conditions: Annotated[
        str | None, typer.Option(help="dpo: plain, distractor or plain,distractor [default: as the prompts say].")
    ] = None,
    samples: Annotated[int, typer.Option(help="dpo: responses per prompt.")] = 8,
    temperature: Annotated[float, typer.Option(help="dpo: sampling temperature.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="dpo: longest sampled response in tokens.")] = 256,
    sample_batch: Annotated[int, typer.Option(help="dpo: responses per forward pass of the sampling.")] = 32,
    lora: Annotated[int | None, typer.Option(help="Train an adapter of this rank [default: all weights].")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of the adapter [default: twice the rank].")] = None,
    lora_target: Annotated[
        list[str] | None, typer.Option(help="Module with an adapter; may be repeated [default: all linear ones].")
    ] = None,
    merge: Annotated[bool, typer.Option(help="Write the model with the adapter merged in, and the adapter.")] = True,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak learning rate [default: sft 1e-5, dpo 5e-7; with an adapter 1e-4 and 1e-5]."),
    ] = None,
    beta: Annotated[float, typer.Option(help="dpo: strength of the pull towards M0.")] = 0.1,
    loss_type: Annotated[
        list[str] | None, typer.Option(help="dpo: loss of TRL's trainer; may be repeated [default: sigmoid].")
    ] = None,
    loss_weight: Annotated[list[float] | None, typer.Option(help="dpo: weight of each loss [default: 1 each].")] = None,
    label_smoothing: Annotated[float, typer.Option(help="dpo: of the losses robust and exo_pair.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Passes over the responses or pairs.")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Responses or pairs per optimizer step.")] = 32,
    accumulation: Annotated[int, typer.Option(help="Forward passes that those of a step are spread over.")] = 1,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.1,
    scheduler: Annotated[str, typer.Option(help="Rate after the warm-up: linear, cosine or constant.")] = "linear",
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0,
    adam_beta1: Annotated[float, typer.Option(help="First beta of AdamW.")] = 0.9,
    adam_beta2: Annotated[float, typer.Option(help="Second beta of AdamW.")] = 0.999,
    adam_epsilon: Annotated[float, typer.Option(help="Epsilon of AdamW.")] = 1e-8,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this norm; 0 for never.")] = 1.0,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Batches of similar length, in random order.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling, the order and the adapter's first weights.")] = 0,
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
        typer.Option(help="dpo: directory of M0's log-probabilities [default: .pairtrace-reference beside --out]."),
    ] = None,
    max_length: MaxLength = 1024,
    truncation: Truncation = "keep_start",
    limit: Annotated[int | None, typer.Option(help="sft: only the first rows.")] = None,
    prompt: Annotated[str | None, typer.Option(help="sft: column with the prompt [default: recognised].")] = None,
    completion: Annotated[str | None, typer.Option(help="sft: column with the response [default: recognised].")] = None,
    split: Split = None,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    json: Json = False,
) -> Answer:
    """Fine-tune a checkpoint against a probe, or against a control. Resumes where it stopped."""
    options = settings(
        locals(),
        max_length=max_length or None,
        probe_layers=None if probe_layers is None else numbers(probe_layers, "--probe-layers"),
        conditions=None if conditions is None else tuple(conditions.split(",")),
        loss_type=tuple(loss_type or ("sigmoid",)),
        loss_weights=tuple(loss_weight or ()),
        lora_targets=tuple(lora_target or ()),
    )
    del options["loss_weight"], options["lora_target"]
    from pairtrace.engine.finetuning.config import FinetuneConfig
    from pairtrace.engine.finetuning.finetune import finetune

    summary = finetune(FinetuneConfig(**options), progress())
    if summary.already_complete:
        logger.info("%s is already trained with these settings: nothing to do", out)
    figures = summary.to_dict()
    return Answer(figures, json, text=f"{summary_text(figures)}\n{_ABOUT}")


@app.command(
    "detectability",
    epilog="Example: pairtrace detectability prompts.jsonl ./sft by-sft=./s1 by-sft=./s2 by-dpo=./d1 "
    "--probe harm.safetensors --rollouts judged.parquet --out detect.json",
)
def _detectability(
    prompts: Annotated[str, typer.Argument(help="Prompts to answer, as for evaluate; `benign` tells the two kinds.")],
    before: Annotated[str, typer.Argument(help="Checkpoint from before the training.")],
    after: Annotated[
        list[str], typer.Argument(help="Trained checkpoints, as NAME=DIRECTORY; those with one name are its runs.")
    ],
    probe: Annotated[str, typer.Option(help="Probe file; its probes belong to BEFORE.")],
    rollouts: Annotated[str, typer.Option(help="Judged responses of both classes, which every model reads.")],
    out: Annotated[str, typer.Option(help="Report to write (.json); the figure (.svg) goes beside it.")],
    text: Annotated[
        str | None, typer.Option(help="Held-out benign responses, as for finetune --method sft, for the loss.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of --rollouts that holds the verdicts.")] = None,
    answers_of: Annotated[
        str | None, typer.Option(help="Only responses of these models in --rollouts, comma-separated.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers of the probes, comma-separated [default: the best one of the file].")
    ] = None,
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation of new probes.")] = 5,
    judged_share: Annotated[
        float, typer.Option(help="Share of the prompts to measure on, where few are those of the probes' training.")
    ] = 0.5,
    rules: Annotated[str | None, typer.Option(help="Rule file of the judge [default: refusal, built in].")] = None,
    refusal_rules: Annotated[
        str | None, typer.Option(help="Rule file that tells refusals on benign prompts [default: refusal, built in].")
    ] = None,
    conditions: Annotated[
        str | None, typer.Option(help="plain, distractor or plain,distractor [default: as the prompts say].")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Responses per batch.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of sampling, splits and bootstrap.")] = 0,
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    replicates: Annotated[int, typer.Option(help="Replicates of the bootstrap.")] = 2000,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option("--compute-dtype", help="Dtype of the forward passes.")] = "auto",
    max_length: MaxLength = 1024,
    truncation: Truncation = "keep_start",
    token_budget: Annotated[int, typer.Option(help="Tokens per forward pass.")] = 4096,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    json: Json = False,
) -> Answer:
    """Report behaviour, helpfulness, loss and ROC-AUC of old, held-out and retrained probes before and after."""
    options = settings(
        locals(),
        after=tuple(after),
        answers_of=() if answers_of is None else tuple(answers_of.split(",")),
        layers=None if layers is None else numbers(layers),
        conditions=None if conditions is None else tuple(conditions.split(",")),
    )
    from pairtrace.engine.detectability.config import DetectabilityConfig
    from pairtrace.engine.detectability.figures import METRICS
    from pairtrace.engine.detectability.measure import detectability

    found = detectability(DetectabilityConfig(**options), progress())
    told = [f"{name}: {METRICS[name]}" for name in METRICS if name in found.before.figures]
    return Answer(found.to_dict(), json, text="\n".join([*table_lines(found.rows()), *told]))
