"""The command that watches a training run for behaviour that it brings in."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.options import Device, Json, Template, TemplateDate, TokenBudget, Truncation, settings
from pairtrace.terminal import ALERTED, Answer, progress

app = typer.Typer()


@app.command(
    "monitor",
    epilog="Example: pairtrace monitor ./dpo-run --base ./sft --prompts bag.jsonl --rules refusal --out watch",
)
def _monitor(
    run: Annotated[str, typer.Argument(help="Directory of checkpoints: one directory each, such as checkpoint-100.")],
    base: Annotated[str, typer.Option(help="Checkpoint that training started from (M0).")],
    prompts: Annotated[str, typer.Option(help="Bag of prompts, hundreds of them, yaml or jsonl.")],
    out: Annotated[str, typer.Option(help="Directory of the log, the plot, the answers and new directions.")],
    known: Annotated[
        str | None, typer.Option(help="Directory that `pairtrace discover prompts` wrote: known clusters.")
    ] = None,
    rules: Annotated[
        str | None, typer.Option(help="Rule file of a judge, or refusal for the built-in one [default: no judge].")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for checkpoints that are still to come.")] = False,
    until_step: Annotated[int | None, typer.Option(help="End after this step.")] = None,
    patience: Annotated[
        float | None, typer.Option(help="With --follow: end when no checkpoint came for so many seconds.")
    ] = None,
    poll_seconds: Annotated[float, typer.Option(help="With --follow: time between two looks.")] = 5.0,
    on_alert: Annotated[str, typer.Option(help="log, or stop: end at the first alert.")] = "log",
    layer: Annotated[int | None, typer.Option(help="Residual layer [default: that of --known, or the last].")] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    null_samples: Annotated[
        int, typer.Option(help="Further answers of M0 per prompt, which show how far answers vary untrained.")
    ] = 4,
    null_temperature: Annotated[
        float | None, typer.Option(help="Their temperature [default: --temperature, or 0.7].")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response in tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Responses per batch.")] = 64,
    min_cluster_size: Annotated[
        int | None, typer.Option(help="Prompts that make a new cluster [default: 2 % of the bag, at least 5].")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Chance of a false alarm in a whole run.")] = 0.01,
    min_growth: Annotated[
        float,
        typer.Option(help="Least growth of a cluster that counts, as a share of the bag; any, where verdicts turned."),
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of sampling and clustering.")] = 0,
    cache: Annotated[
        str | None, typer.Option(help="Directory of M0's answers, to share [default: m0 in --out].")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option("--compute-dtype", help="Dtype of the forward passes [auto: M0's own].")
    ] = "auto",
    max_length: Annotated[int, typer.Option(help="Longest sequence in tokens when read; 0 for no limit.")] = 1024,
    truncation: Truncation = "keep_start",
    token_budget: TokenBudget = None,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    json: Json = False,
) -> Answer:
    """Watch a run: what do its checkpoints answer otherwise than M0? Exit code 3 when there is an alert."""
    options = settings(locals())
    from pairtrace.engine.monitoring.config import MonitorRunConfig
    from pairtrace.engine.monitoring.run import monitor_run

    found = monitor_run(MonitorRunConfig(**options), progress())
    return Answer(found.to_dict(), json, code=ALERTED if found.alerts else 0)
