"""The front door: parse, build one configuration, call one engine function, print a summary."""

from __future__ import annotations

import json as json_module
import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pairtrace.errors import ConfigError, PairtraceError
from pairtrace.options import (
    Behavior,
    Codec,
    Column,
    ComputeDtype,
    Data,
    Device,
    Format,
    Json,
    Layers,
    Limit,
    MaxLength,
    Scores,
    Split,
    StoreDtype,
    Template,
    TemplateDate,
    TokenBudget,
    Truncation,
)
from pairtrace.version import __version__

if TYPE_CHECKING:
    from pairtrace.engine.progress import Progress


logger = logging.getLogger("pairtrace")


class _Commands(TyperGroup):
    """Turns the package's errors into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PairtraceError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="pairtrace",
    cls=_Commands,
    help="Which preference pairs taught the model this behaviour? Cached activations answer in seconds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
store_app = typer.Typer(help="Look into an activation store and check it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(store_app, name="store")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress bars on stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Notes of the libraries as well.")] = False,
) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("pairtrace").setLevel(logging.WARNING if quiet else logging.INFO)


@app.command(
    "extract", epilog="Example: pairtrace extract prefs.jsonl --model ./sft-checkpoint --layers 20 --store acts.zarr"
)
def _extract(
    data: Data,
    model: Annotated[str, typer.Option(help="Checkpoint from before preference training (M0): directory or hub id.")],
    layers: Layers,
    store: Annotated[str, typer.Option(help="Activation store to make or resume.")],
    sides: Annotated[bool, typer.Option("--sides", help="Keep the means of chosen and rejected too.")] = False,
    dtype: StoreDtype = "float16",
    codec: Codec = "none",
    compute_dtype: ComputeDtype = "auto",
    device: Device = "auto",
    max_length: MaxLength = 1024,
    truncation: Truncation = "keep_start",
    token_budget: TokenBudget = None,
    shard_rows: Annotated[int | None, typer.Option(help="Rows per shard [default: 64 to 2048 by size].")] = None,
    reuse: Annotated[list[str] | None, typer.Option(help="Store to copy known pairs from; may be repeated.")] = None,
    limit: Limit = None,
    format: Format = None,
    prompt: Column = None,
    chosen: Column = None,
    rejected: Column = None,
    source: Column = None,
    split: Split = None,
    chat_template: Template = None,
    template_date: TemplateDate = None,
    fsync: Annotated[bool, typer.Option(help="Force each shard to disk before it is marked.")] = True,
    json: Json = False,
) -> None:
    """Run a checkpoint over every pair once and keep its mean response activations. Resumes where it stopped."""
    options = _settings(locals(), layers=_numbers(layers), max_length=max_length or None, reuse=tuple(reuse or ()))
    from pairtrace.engine.extract import ExtractConfig, extract

    summary = extract(ExtractConfig(**options), _progress())
    if summary.already_complete:
        logger.info("%s already holds all %s rows of this data: nothing to do", store, f"{summary.rows:,}")
    _print_summary(summary.to_dict(), json)
    if summary.ok == 0:
        raise PairtraceError(f"every row was quarantined ({summary.reasons}): the store has nothing to score")


@store_app.command("info", epilog="Example: pairtrace store info acts.zarr")
def _store_info(store: Annotated[str, typer.Argument(help="Activation store.")], json: Json = False) -> None:
    """Show what a store was made from and how far it is."""
    from pairtrace.store.reader import ActivationStore

    opened = ActivationStore.open(store, allow_incomplete=True)
    _print_summary({"store": store, **opened.summary(), **opened.manifest.to_json()}, json)


@store_app.command("verify", epilog="Example: pairtrace store verify acts.zarr")
def _store_verify(store: Annotated[str, typer.Argument(help="Activation store.")], json: Json = False) -> None:
    """Read every byte of a store and check it: checksums, norms, status. Exit code 1 when anything is wrong."""
    from pairtrace.store.verify import verify

    report = verify(store, _progress())
    problems = [str(problem) for problem in report.problems]
    missing = len(report.missing_shards)
    _print_summary(
        {"store": store, "ok": report.ok, "rows": report.rows, "shards": report.shards, "missing_shards": missing}
        | {"problems": problems},
        json,
    )
    if not report.ok:
        raise PairtraceError(
            f"{store}: problems found: {len(problems)}, shards missing: {missing} of {report.shards}; delete the "
            "mark of a damaged shard (status/c/N) and run the extraction again: it computes what has no mark"
        )


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
    rules: Annotated[str | None, typer.Option(help="Rule file of the judge [default: refusal patterns].")] = None,
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
    json: Json = False,
) -> None:
    """Sample both checkpoints, judge, filter, and turn what changed into directions."""
    options = _settings(
        locals(),
        layers=None if layers is None else _numbers(layers),
        samples=samples if samples is not None else 8 if temperature else 1,
    )
    from pairtrace.engine.behavior import BehaviorConfig, build_behavior

    _print_summary(build_behavior(BehaviorConfig(**options), _progress()).to_dict(), json)


@app.command("score", epilog="Example: pairtrace score acts.zarr b.safetensors --out scores.parquet")
def _score(
    store: Annotated[str, typer.Argument(help="Activation store.")],
    behaviors: Annotated[list[str], typer.Argument(help="Direction files: .safetensors or .npy.")],
    out: Annotated[str, typer.Option(help="Scores table to write (.parquet).")],
    layer: Annotated[int | None, typer.Option(help="Residual layer [default: the deepest common one].")] = None,
    allow_incomplete: Annotated[bool, typer.Option("--allow-incomplete", help="Score the finished rows.")] = False,
    json: Json = False,
) -> None:
    """Score every pair against behaviour directions: cosine, or the maximum over a bank."""
    from pairtrace.engine.score import ScoreConfig, score

    config = ScoreConfig(
        store=store, directions=tuple(behaviors), out=out, layer=layer, allow_incomplete=allow_incomplete
    )
    _print_summary(score(config, _progress()).to_dict(), json)


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
) -> None:
    """Print the pairs behind the ranks."""
    from pairtrace.engine.ranking import top
    from pairtrace.terminal import pair_text

    pairs = top(scores, data=data, behavior=behavior, k=k, ends=end, split=split)  # type: ignore[arg-type]
    if json:
        _print_summary({"pairs": [pair.to_dict() for pair in pairs]}, True)
    else:
        print("\n".join(pair_text(pair, width) for pair in pairs))


@app.command("sources", epilog="Example: pairtrace sources scores.parquet -k 1000")
def _sources(
    scores: Scores,
    behavior: Behavior = None,
    k: Annotated[int | None, typer.Option("-k", help="Size of the top [default: 1 % of the rows].")] = None,
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    json: Json = False,
) -> None:
    """Show each source's share of the top of the ranking, with intervals, against its share of the data."""
    from pairtrace.engine.ranking import sources
    from pairtrace.terminal import sources_table

    shares = sources(scores, behavior=behavior, k=k, confidence=confidence)
    if json:
        _print_summary({"sources": [share.to_dict() for share in shares]}, True)
    else:
        print(sources_table(shares))


@app.command("plan", epilog="Example: pairtrace plan prefs.jsonl --model ./sft --layers 20 --gpu H100 --price 2.50")
def _plan(
    data: Data,
    model: Annotated[str, typer.Option(help="Checkpoint; only its configuration and tokenizer are read.")],
    layers: Layers,
    gpu: Annotated[str | None, typer.Option(help="GPU, for its peak: H200, H100, A100, L40S and others.")] = None,
    gpu_flops: Annotated[float | None, typer.Option(help="Peak FLOP/s, instead of --gpu.")] = None,
    mfu: Annotated[
        float, typer.Option("--utilisation", help="Share of the peak that is reached: an assumption.")
    ] = 0.4,
    price_per_hour: Annotated[float | None, typer.Option("--price", help="Price of an hour of that GPU.")] = None,
    sample: Annotated[int, typer.Option(help="Rows to tokenise for the estimate; 0 for all.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    sides: Annotated[bool, typer.Option("--sides", help="Plan for a store with both sides.")] = False,
    dtype: StoreDtype = "float16",
    max_length: MaxLength = 1024,
    truncation: Truncation = "keep_start",
    chat_template: Template = None,
    template_date: TemplateDate = None,
    limit: Limit = None,
    format: Format = None,
    prompt: Column = None,
    chosen: Column = None,
    rejected: Column = None,
    source: Column = None,
    split: Split = None,
    json: Json = False,
) -> None:
    """Estimate tokens, FLOPs, store size, hours and money before any run."""
    options = _settings(locals(), layers=_numbers(layers), max_length=max_length or None, sample=sample or None)
    from pairtrace.engine.plan import PlanConfig, plan

    summary = plan(PlanConfig(**options), _progress()).to_dict()
    if not json:
        # The two procedures side by side read best as the rows of one table.
        summary["procedures"] = [summary.pop("pairtrace"), summary.pop("published")]
    _print_summary(summary, json)


@app.command("demo", epilog="Example: pairtrace demo --out demo --seed 1 --json")
def _demo(
    out: Annotated[
        str, typer.Option(help="Directory for everything; finished stages in it are kept.")
    ] = ".pairtrace-demo",
    seed: Annotated[int, typer.Option(help="Seed of the organism.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads of the training [default: PyTorch's].")] = None,
    json: Json = False,
) -> None:
    """Train a tiny model that learns a bad habit from planted pairs, and find those pairs."""
    from pairtrace.engine.demo import DemoConfig, run_demo
    from pairtrace.engine.organism.config import OrganismConfig
    from pairtrace.terminal import pair_text, sources_table

    summary = run_demo(DemoConfig(out=out, organism=OrganismConfig(seed=seed, threads=threads)), _progress())
    figures = summary.to_dict()
    if not json:
        for part in ("top", "sources"):
            del figures[part]
        print("The pairs that the ranking blames first:\n")
        print("\n".join(pair_text(pair, 200) for pair in summary.top))
        print(f"\n{sources_table(summary.sources)}\n")
    _print_summary(figures, json)


@app.command("version", epilog="Example: pairtrace version")
def _version(json: Json = False) -> None:
    """Print the version."""
    _print_summary({"version": __version__}, json)


def _progress() -> Progress:
    from pairtrace.engine.progress import NULL_PROGRESS
    from pairtrace.terminal import Bars

    # The quiet option took the notes' level away as well.
    return Bars() if logging.getLogger("pairtrace").isEnabledFor(logging.INFO) else NULL_PROGRESS


def _settings(given: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A command's options as fields of its configuration, which has the same names; output options are left out."""
    return {name: value for name, value in given.items() if name != "json"} | changed


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--layers is {text!r}; expected numbers separated by commas, for example 20,24") from None


def _print_summary(summary: dict[str, Any], as_json: bool) -> None:
    from pairtrace.terminal import summary_text

    print(json_module.dumps(summary, default=str) if as_json else summary_text(summary))


def main() -> None:
    """Run the command line. Exit code 0 only on success: 1 for an error, 2 for wrong usage, 130 when interrupted."""
    app()


if __name__ == "__main__":
    main()
