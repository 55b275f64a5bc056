"""The group of commands for linear probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pairtrace.errors import ConfigError
from pairtrace.options import Device, Json, Template, TemplateDate, TokenBudget, numbers, settings
from pairtrace.terminal import Answer, progress, table_lines

if TYPE_CHECKING:
    from pairtrace.engine.probes.figures import Figures

app = typer.Typer(help="Train linear probes, evaluate and compare them.", no_args_is_help=True, rich_markup_mode=None)

ProbeStore = Annotated[
    str | None, typer.Option(help="Activation store made with --sides: chosen is class 1, rejected class 0.")
]
ProbeData = Annotated[str | None, typer.Option(help="Data of --store [default: where the store recorded it].")]
LabelColumn = Annotated[
    str | None,
    typer.Option(help="Column with the classes: of the data of --store (see --side), or of --rollouts."),
]
Side = Annotated[str, typer.Option(help="Which response --label-column of a store speaks of: chosen or rejected.")]
AllowIncomplete = Annotated[bool, typer.Option("--allow-incomplete", help="Use the finished rows of --store.")]
Rollouts = Annotated[
    str | None, typer.Option(help="Judged responses: *.rollouts.parquet, *.responses.parquet, or your own.")
]
AnswersOf = Annotated[
    str | None, typer.Option(help="Only responses of these models in --rollouts, comma-separated (base, tuned, ...).")
]
Model = Annotated[str | None, typer.Option(help="Checkpoint that --rollouts are read through.")]
MaxRows = Annotated[int, typer.Option(help="Examples in memory at most, drawn at random; statistics take all.")]
Confidence = Annotated[float, typer.Option(help="Level of the intervals.")]
Bins = Annotated[int, typer.Option(help="Bins of the reliability diagram.")]
ComputeDtype = Annotated[str, typer.Option("--compute-dtype", help="Dtype of the forward passes.")]
MaxLength = Annotated[int, typer.Option(help="Longest sequence in tokens; 0 for no limit.")]
Truncation = Annotated[str, typer.Option(help="Which end of a longer sequence stays: keep_start or keep_end.")]


@app.command(
    "train", epilog="Example: pairtrace probe train --store acts.zarr --layers 16,20,24 --out harm.safetensors"
)
def _train(
    out: Annotated[str, typer.Option(help="Probe file to write (.safetensors); score takes it as it is.")],
    store: ProbeStore = None,
    data: ProbeData = None,
    label_column: LabelColumn = None,
    side: Side = "chosen",
    allow_incomplete: AllowIncomplete = False,
    rollouts: Rollouts = None,
    answers_of: AnswersOf = None,
    model: Model = None,
    layers: Annotated[str | None, typer.Option(help="Residual layers, comma-separated [default: all].")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the behaviour [default: the stem of --out].")] = None,
    strengths: Annotated[
        str | None, typer.Option(help="Values of C to choose from, comma-separated [default: 1e-5 to 10].")
    ] = None,
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation; a prompt is in one of them.")] = 5,
    test_share: Annotated[
        float, typer.Option(help="Share of the prompts kept out of training, for the figures.")
    ] = 0.2,
    members: Annotated[int, typer.Option(help="Probes in the ensemble; 1 for a single one.")] = 1,
    vary: Annotated[str, typer.Option(help="What members differ in: bootstrap or seeds (subsets of prompts).")] = (
        "bootstrap"
    ),
    hold_out: Annotated[int, typer.Option(help="Further probes for monitoring only.")] = 0,
    max_rows: MaxRows = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    confidence: Confidence = 0.95,
    bins: Bins = 10,
    device: Device = "auto",
    dtype: ComputeDtype = "auto",
    max_length: MaxLength = 1024,
    truncation: Truncation = "keep_start",
    token_budget: TokenBudget = None,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    json: Json = False,
) -> Answer:
    """Train probes on mean response activations, and say how good they are on prompts they have not seen."""
    options = settings(
        locals(),
        layers=None if layers is None else numbers(layers),
        answers_of=_listed(answers_of),
    )
    options.pop("strengths")
    if strengths is not None:
        options["strengths"] = _strengths(strengths)
    from pairtrace.engine.probes.config import ProbeTrainConfig
    from pairtrace.engine.probes.train import train_probes

    found = train_probes(ProbeTrainConfig(**options), progress())
    rows = [(one.name, one.layer, one.role, one.strength, one.figures) for one in found.probes]
    head = (
        f"{found.out}: {found.examples:,} examples ({found.positives:,} of class 1) of {found.prompts:,} prompts; "
        f"figures on {found.held_out_examples:,} of them, prompts kept out of training; best layer by "
        f"cross-validation {found.best_layer}"
    )
    return Answer(found.to_dict(), json, text="\n".join([head, *_left_out(found.left_out), *_table(rows)]))


@app.command("eval", epilog="Example: pairtrace probe eval harm.safetensors --rollouts r.parquet --model ./dpo")
def _eval(
    probe: Annotated[str, typer.Argument(help="Probe file made by `pairtrace probe train`.")],
    out: Annotated[str | None, typer.Option(help="Report to write (.json).")] = None,
    store: ProbeStore = None,
    data: ProbeData = None,
    label_column: LabelColumn = None,
    side: Side = "chosen",
    allow_incomplete: AllowIncomplete = False,
    rollouts: Rollouts = None,
    answers_of: AnswersOf = None,
    model: Model = None,
    layers: Annotated[str | None, typer.Option(help="Only probes of these layers, comma-separated.")] = None,
    roles: Annotated[
        str | None, typer.Option(help="Only probes of these roles: training, held-out, baseline (comma-separated).")
    ] = None,
    include_training: Annotated[
        bool, typer.Option("--include-training", help="Use prompts that the probes were trained on as well.")
    ] = False,
    max_rows: MaxRows = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of the draw of --max-rows.")] = 0,
    confidence: Confidence = 0.95,
    bins: Bins = 10,
    device: Device = "auto",
    dtype: ComputeDtype = "auto",
    max_length: MaxLength = 1024,
    truncation: Truncation = "keep_start",
    token_budget: TokenBudget = None,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    json: Json = False,
) -> Answer:
    """Measure probes on the activations of any model with their tokenizer and width, on prompts new to them."""
    options = settings(
        locals(),
        layers=None if layers is None else numbers(layers),
        answers_of=_listed(answers_of),
        roles=_listed(roles),
    )
    from pairtrace.engine.probes.config import ProbeEvalConfig
    from pairtrace.engine.probes.evaluate import evaluate_probes

    found = evaluate_probes(ProbeEvalConfig(**options), progress())
    rows = [(one.name, "all" if one.layer is None else one.layer, one.role, None, one.figures) for one in found.probes]
    of = "the model of the probes" if found.same_model else "another model than that of the probes"
    head = f"{found.activations}: {found.examples:,} examples, activations of {of}"
    if found.trained_on:
        head += f"; {found.trained_on:,} of prompts that the probes were trained on are left out"
    return Answer(found.to_dict(), json, text="\n".join([head, *_left_out(found.left_out), *_table(rows)]))


@app.command(
    "compare", epilog="Example: pairtrace probe compare before.safetensors after.safetensors --store acts.zarr"
)
def _compare(
    first: Annotated[str, typer.Argument(help="Probe or direction file.")],
    second: Annotated[str, typer.Argument(help="Another one, or the same to compare its own with each other.")],
    store: Annotated[str | None, typer.Option(help="Activation store whose pairs are ranked by both.")] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers, comma-separated [default: all].")] = None,
    top_share: Annotated[float, typer.Option(help="Share of the pairs that counts as the top.")] = 0.01,
    allow_incomplete: AllowIncomplete = False,
    json: Json = False,
) -> Answer:
    """Show how alike probes or directions are: cosine, and agreement of their rankings of a store."""
    options = settings(locals(), layers=None if layers is None else numbers(layers))
    from pairtrace.engine.probes.compare import ProbeCompareConfig, compare_probes

    found = [one.to_dict() for one in compare_probes(ProbeCompareConfig(**options), progress())]
    rows = [{key: _cell(value) for key, value in one.items()} for one in found]
    return Answer({"pairs": found}, json, text="\n".join(table_lines(rows)))


def _listed(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(text.split(","))


def _strengths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--strengths is {text!r}; expected numbers separated by commas, for example 0.001,0.1"
        ) from None


def _left_out(counts: dict[str, int]) -> list[str]:
    return [f"left out: {', '.join(f'{count:,} {reason}' for reason, count in counts.items())}"] if counts else []


def _table(rows: Sequence[tuple[str, Any, str, float | None, Figures]]) -> list[str]:
    trained = any(strength is not None for *_, strength, _ in rows)
    return table_lines(
        [
            {
                "probe": name,
                "layer": str(layer),
                "role": role,
                **({"C": _cell(strength)} if trained else {}),
                "ROC-AUC": f"{_cell(found.roc_auc.value)} ({found.roc_auc.low:.3f} to {found.roc_auc.high:.3f})",
                "Brier": _cell(found.brier),
                "calibration error": _cell(found.calibration_error),
            }
            for name, layer, role, strength, found in rows
        ]
    )


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"
        case _:
            return str(value)
