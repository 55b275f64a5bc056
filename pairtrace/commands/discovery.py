"""The group of commands that find what nobody has named, and the one that clusters the pairs of a store."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.commands import discovery_prompts, discovery_show
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
from pairtrace.errors import ConfigError
from pairtrace.options import Json, settings
from pairtrace.terminal import Answer, progress

app = typer.Typer(
    help="Find behaviours and kinds of pair that nobody has named.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("pairs", epilog="Example: pairtrace discover pairs acts.zarr --out kinds --components 50 --sample all")
def _pairs(
    store: Annotated[str, typer.Argument(help="Activation store.")],
    out: Annotated[str, typer.Option(help="Directory to write; the reduced pairs are kept there for another run.")],
    layer: Annotated[int | None, typer.Option(help="Residual layer [default: the deepest of the store].")] = None,
    min_cluster_size: Annotated[
        int | None, typer.Option(help="Pairs that make a cluster [default: a thousandth of them, at least 15].")
    ] = None,
    min_samples: Annotated[
        int, typer.Option(help="The density at a pair is read at this neighbour; more smooth it.")
    ] = 5,
    selection: Annotated[str, typer.Option(help="eom takes the most persistent clusters, leaf the finest.")] = "eom",
    method: Annotated[
        str, typer.Option(help="exact (the hdbscan package), graph (approximate neighbours), or auto: by the number.")
    ] = "auto",
    components: Annotated[int, typer.Option(help="Principal components that the pairs are reduced to.")] = 50,
    sample: Annotated[str, typer.Option(help="Cluster so many pairs, drawn at random; or all.")] = "all",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler whose workers read the store [default: here].")
    ] = None,
    allow_incomplete: Annotated[bool, typer.Option("--allow-incomplete", help="Use the finished rows.")] = False,
    checksum: Annotated[bool, typer.Option(help="Compare the checksum of every shard that is reduced.")] = True,
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
    json: Json = False,
) -> Answer:
    """Which kinds of pair does the data hold? Cluster the pairs by what they would teach, and describe each cluster."""
    options = settings(locals(), sample=_number_or_all(sample))
    description = description_config(options)
    from pairtrace.engine.discovery.pairs_view import PairsConfig, discover_pairs

    found = discover_pairs(PairsConfig(**options, description=description), progress())
    return discovery_show.discovery_answer(found, json)


app.add_typer(discovery_prompts.app)
app.add_typer(discovery_show.app)


def _number_or_all(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--sample is {text!r}; expected a number, or all") from None
