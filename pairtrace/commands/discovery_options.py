"""Options that say how clusters are described, for every command that discovers some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pairtrace.errors import ConfigError

if TYPE_CHECKING:
    from pairtrace.engine.discovery.description import DescriptionConfig

Exemplars = Annotated[int, typer.Option(help="Members shown per cluster.")]
TopDatapoints = Annotated[int, typer.Option(help="Rows of the store shown per cluster.")]
Metadata = Annotated[
    list[str] | None,
    typer.Option(help="Column that clusters may be enriched in; may be repeated [default: all plain ones]."),
]
StoreData = Annotated[str | None, typer.Option(help="Preference data [default: the path the store was made from].")]
Fdr = Annotated[float, typer.Option(help="Share of false discoveries allowed among enrichments.")]
StabilityRuns = Annotated[int, typer.Option(help="Bootstrap runs that measure stability; 0 for none.")]
StabilityItems = Annotated[int, typer.Option(help="Most items that a bootstrap run draws.")]
BaseUrl = Annotated[str | None, typer.Option(help="OpenAI-compatible server of a judge that names the clusters.")]
JudgeModel = Annotated[str | None, typer.Option(help="Name of the judge on that server.")]
ApiKeyEnv = Annotated[str | None, typer.Option(help="Environment variable that holds the judge's key.")]


def description_config(options: dict[str, Any]) -> DescriptionConfig:
    """Take the options above, by their names in lower case, and "seed" out of a command's options.

    The names are `exemplars`, `top_datapoints`, `metadata`, `data`, `fdr`, `stability_runs`, `stability_items`,
    `base_url`, `model` and `api_key_env`; they are removed from `options`, and "seed" is only read.

    Raises:
        ConfigError: an option is out of range, or the judge is given by half.
    """
    from pairtrace.engine.discovery.description import DescriptionConfig
    from pairtrace.engine.discovery.naming import NamingConfig
    from pairtrace.engine.discovery.stability import StabilityConfig

    base_url, model, api_key_env = (options.pop(name) for name in ("base_url", "model", "api_key_env"))
    if (base_url is None) != (model is None):
        raise ConfigError("expected both --base-url and --model, for a judge that names the clusters, or neither")
    metadata = options.pop("metadata")
    return DescriptionConfig(
        exemplars=options.pop("exemplars"),
        top_datapoints=options.pop("top_datapoints"),
        metadata=tuple(metadata) if metadata else None,
        data=options.pop("data"),
        false_discovery_rate=options.pop("fdr"),
        stability=StabilityConfig(
            runs=options.pop("stability_runs"), items=options.pop("stability_items"), seed=options["seed"]
        ),
        naming=None if base_url is None else NamingConfig(base_url=base_url, model=model, api_key_env=api_key_env),
    )
