"""The commands that make a vector to steer along, and steer a model along a direction."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.errors import ConfigError
from pairtrace.options import Device, Json, Template, TemplateDate, numbers, settings
from pairtrace.terminal import Answer, progress, table_lines

app = typer.Typer()


@app.command(
    "shift",
    epilog="Example: pairtrace shift prompts.jsonl --base ./sft --tuned ./dpo --out shift.safetensors",
)
def _shift(
    prompts: Annotated[
        str, typer.Argument(help="Prompts on which training changed the model, yaml or jsonl, as for `evaluate`.")
    ],
    base: Annotated[str, typer.Option(help="M0, the checkpoint from before training.")],
    tuned: Annotated[str, typer.Option(help="M1, the checkpoint after it.")],
    out: Annotated[str, typer.Option(help="Direction file to write (.safetensors), for `steer`.")],
    name: Annotated[str | None, typer.Option(help="Name of the vector [default: from --out].")] = None,
    layers: Annotated[str | None, typer.Option(help="Residual layers, comma-separated [default: all from 1].")] = None,
    conditions: Annotated[
        str | None, typer.Option(help="plain, distractor or both, comma-separated [default: as the prompts say].")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option("--compute-dtype", help="Dtype of the forward passes.")] = "auto",
    token_budget: Annotated[int, typer.Option(help="Tokens per forward pass.")] = 4096,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    json: Json = False,
) -> Answer:
    """Measure how training moved the residual stream at the end of the prompts: a vector to steer along."""
    options = settings(
        locals(),
        layers=None if layers is None else numbers(layers),
        conditions=None if conditions is None else tuple(conditions.split(",")),
    )
    from pairtrace.engine.steering.shift import ShiftConfig, measure_shift

    found = measure_shift(ShiftConfig(**options), progress())
    head = f"{found.name}: {found.requests} requests, width {found.width}, in {found.out}"
    foot = "share: of the mean length of a state of M0; agreement: cosine of the vectors of two halves of the prompts"
    return Answer(found.to_dict(), json, text="\n".join([head, *table_lines(found.to_rows()), foot]))


@app.command(
    "steer",
    epilog="Example: pairtrace steer prompts.jsonl ./sft --directions b.safetensors --scales 0.25,0.5 --out steer.json",
)
def _steer(
    prompts: Annotated[str, typer.Argument(help="Prompts, yaml or jsonl, as for `evaluate`.")],
    model: Annotated[str, typer.Argument(help="Checkpoint that answers.")],
    directions: Annotated[str, typer.Option(help="Direction or probe file.")],
    out: Annotated[str, typer.Option(help="Report to write (.json); responses go beside it, a rerun goes on.")],
    behavior: Annotated[str | None, typer.Option(help="Which vector of --directions [default: the only one].")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Residual layers, comma-separated, one at a time [default: those of the file].")
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            help="Lengths to add, comma-separated, in units of the mean norm of the residual stream at the layer; "
            "negative ones push away [default: 0.25,0.5,1; none with --ablate]."
        ),
    ] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Project the direction out of the stream.")] = False,
    ablate_layers: Annotated[
        str,
        typer.Option(
            help="Where --ablate acts: own (the direction's layer), or all (every layer, so that no block writes it "
            "again)."
        ),
    ] = "own",
    ablate_to: Annotated[
        str,
        typer.Option(
            help="What --ablate leaves of the direction: zero, or base (as much as the base model has at the end of "
            "the prompts; with a file of `shift`)."
        ),
    ] = "zero",
    positions: Annotated[
        str,
        typer.Option(
            help="Where: all tokens, generated (from the last token of the prompt on) or prompt_end (that token alone)."
        ),
    ] = "all",
    controls: Annotated[int, typer.Option(help="Random directions of the same length, to compare with.")] = 1,
    norm_responses: Annotated[int, typer.Option(help="Unsteered responses that the mean norm is taken from.")] = 128,
    rules: Annotated[str | None, typer.Option(help="Rule file of the judge [default: refusal, built in].")] = None,
    refusal_rules: Annotated[str | None, typer.Option(help="The same for benign prompts.")] = None,
    conditions: Annotated[
        str | None, typer.Option(help="plain, distractor or both, comma-separated [default: as the prompts say].")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    samples: Annotated[int, typer.Option(help="Responses per request.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Responses per batch.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the sampling and of the random directions.")] = 0,
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    replicates: Annotated[int, typer.Option(help="Of the bootstrap, where there are several samples.")] = 2000,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option("--compute-dtype", help="Dtype of the forward passes.")] = "auto",
    token_budget: Annotated[int, typer.Option(help="Tokens per forward pass where nothing is generated.")] = 4096,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    json: Json = False,
) -> Answer:
    """Add a direction to the residual stream, or project it out, while a model answers; measure the behaviour."""
    options = settings(
        locals(),
        layers=None if layers is None else numbers(layers),
        conditions=None if conditions is None else tuple(conditions.split(",")),
    )
    options.pop("scales")
    if scales is not None or ablate:
        options["scales"] = _scales(scales)
    from pairtrace.engine.steering.config import SteerConfig
    from pairtrace.engine.steering.steer import steer

    found = steer(SteerConfig(**options), progress())
    norms = ", ".join(f"layer {layer}: {norm:.4g}" for layer, norm in found.norms.items())
    head = f"{found.behavior} in {found.model}; judge {found.judge}; mean norms: {norms or 'not needed'}"
    foot = "surprise: nats per token under the unsteered model; where it is high, verdicts are on garbled text"
    return Answer(found.to_dict(), json, text="\n".join([head, *table_lines(found.to_rows()), foot]))


def _scales(text: str | None) -> tuple[float, ...]:
    try:
        return () if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--scales is {text!r}; expected numbers separated by commas, for example 0.25,0.5") from None
