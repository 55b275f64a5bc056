"""Commands that rank the pairs of a store by other methods, into the same scores files."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.errors import ConfigError
from pairtrace.options import (
    CacheGib,
    ComputeDtype,
    DataParallel,
    Device,
    EngineOption,
    Json,
    Template,
    TensorParallel,
    TokenBudget,
    engine_settings,
    settings,
)
from pairtrace.terminal import Answer, progress

app = typer.Typer(
    help="Rank the pairs of a store by another method, for comparison.", no_args_is_help=True, rich_markup_mode=None
)

BaselineStore = Annotated[str, typer.Argument(help="Activation store; it names the data and the checkpoint M0.")]
BaselineOut = Annotated[str, typer.Option(help="Scores table to write (.parquet); its cost goes beside it.")]
BaselineName = Annotated[str, typer.Option(help="Name of the score column.")]
StoreData = Annotated[str | None, typer.Option(help="Preference data [default: the path the store was made from].")]
Base = Annotated[str | None, typer.Option(help="Checkpoint M0 [default: the one the store was made with].")]


@app.command("random", epilog="Example: pairtrace baseline random acts.zarr --out random.parquet --seed 1")
def _random(
    store: BaselineStore,
    out: BaselineOut,
    seed: Annotated[int, typer.Option(help="Seed of the order.")] = 0,
    name: BaselineName = "random",
    json: Json = False,
) -> Answer:
    """Rank the pairs at random."""
    from pairtrace.engine.baselines.simple import RandomConfig, score_random

    return Answer(score_random(RandomConfig(store=store, out=out, seed=seed, name=name)).to_dict(), json)


@app.command("length", epilog="Example: pairtrace baseline length acts.zarr --out length.parquet")
def _length(store: BaselineStore, out: BaselineOut, name: BaselineName = "length", json: Json = False) -> Answer:
    """Score a pair by response tokens of chosen minus rejected: positive where the longer response was chosen."""
    from pairtrace.engine.baselines.simple import LengthConfig, score_length

    return Answer(score_length(LengthConfig(store=store, out=out, name=name)).to_dict(), json)


@app.command("margin", epilog="Example: pairtrace baseline margin acts.zarr --tuned ./dpo --out margin.parquet")
def _margin(
    store: BaselineStore,
    tuned: Annotated[str, typer.Option(help="Checkpoint after preference training (M1).")],
    out: BaselineOut,
    base: Base = None,
    data: StoreData = None,
    beta: Annotated[float, typer.Option(help="Of the DPO loss; scales the scores.")] = 0.1,
    device: Device = "auto",
    compute_dtype: ComputeDtype = "auto",
    token_budget: TokenBudget = None,
    chat_template: Template = None,
    name: BaselineName = "margin",
    json: Json = False,
) -> Answer:
    """Score a pair by its implicit reward margin: how far training moved M1 towards chosen, away from rejected."""
    options = settings(locals())
    from pairtrace.engine.baselines.margin import MarginConfig, score_margin

    return Answer(score_margin(MarginConfig(**options), progress()).to_dict(), json)


@app.command(
    "judge",
    epilog="Example: pairtrace baseline judge acts.zarr --base-url http://localhost:8000/v1 --model qwen3 "
    "--behavior-text 'helps with a crime' --out judge.parquet",
)
def _judge(
    store: BaselineStore,
    out: BaselineOut,
    model: Annotated[str, typer.Option(help="Name of the judge on its server; with --backend vllm a checkpoint.")],
    base_url: Annotated[str, typer.Option(help="OpenAI-compatible server, up to and with /v1.")] = "",
    behavior_text: Annotated[str | None, typer.Option(help="The behaviour to rate, in words.")] = None,
    rubric: Annotated[str | None, typer.Option(help="File with a longer description of the behaviour.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the key.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Questions under way at the same time [default: 8; with --backend vllm 256].")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 120.0,
    attempts: Annotated[int, typer.Option(help="How often a question is asked that fails for a passing reason.")] = 5,
    max_failures: Annotated[int, typer.Option(help="Questions in a row without an answer before giving up.")] = 8,
    ask_again: Annotated[
        bool, typer.Option("--ask-again", help="Ask again where an earlier run was answered without a verdict.")
    ] = False,
    request: Annotated[
        str | None,
        typer.Option(
            help="JSON object merged into each request; null takes an entry out, as in {'temperature': null}."
        ),
    ] = None,
    data: StoreData = None,
    name: BaselineName = "judge",
    backend: Annotated[str, typer.Option(help="Where the judge is: server, or vllm to run it here.")] = "server",
    tensor_parallel: TensorParallel = None,
    data_parallel: DataParallel = None,
    cache_gib: CacheGib = None,
    engine_option: EngineOption = None,
    json: Json = False,
) -> Answer:
    """Have a language model rate each response from 0 to 10; the score of a pair is chosen minus rejected."""
    options = settings(engine_settings(locals()))
    if concurrency is None:
        options["concurrency"] = 256 if backend == "vllm" else 8
    extra = _json_object(options.pop("request"))
    from pairtrace.engine.baselines.judge import score_by_judge
    from pairtrace.engine.baselines.judge_config import JudgeConfig

    return Answer(score_by_judge(JudgeConfig(**options, settings=extra), progress()).to_dict(), json)


def _json_object(text: str | None) -> dict[str, object]:
    from json import loads

    try:
        value = {} if text is None else loads(text)
    except ValueError as error:
        raise ConfigError(f"--request is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--request is {text!r}; expected a JSON object")
    return value
