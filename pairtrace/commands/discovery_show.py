"""The command that prints a discovery, and the answer of every command that makes one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pairtrace.errors import ConfigError
from pairtrace.options import Json
from pairtrace.terminal import Answer, shorten, summary_text, table_lines

if TYPE_CHECKING:
    from pairtrace.engine.discovery.enrichment import Enrichment
    from pairtrace.engine.discovery.product import DescribedCluster, Discovered

app = typer.Typer()

# What became of the rows of a store, by their names in the details of a discovery among pairs.
_ROWS = {
    "used": "used",
    "undefined": "without direction",
    "not_finite": "with NaN or infinity",
    "not_sampled": "not sampled",
    "quarantined": "quarantined",
    "missing": "missing",
}


@app.command("show", epilog="Example: pairtrace discover show ./clusters --cluster 0")
def _show(
    directory: Annotated[str, typer.Argument(help="Directory that a `pairtrace discover` command wrote.")],
    cluster: Annotated[int | None, typer.Option(help="Number of the cluster to show [default: all, in short].")] = None,
    width: Annotated[int, typer.Option(help="Characters of each text to show; 0 for all.")] = 400,
    json: Json = False,
) -> Answer:
    """Print what a discovery found: its clusters, or one of them with its members, datapoints and sources."""
    from pairtrace.engine.discovery.product import read_product

    discovered = read_product(directory)
    if cluster is None:
        return discovery_answer(discovered, json)
    if not 0 <= cluster < len(discovered.clusters):
        known = f"0 to {len(discovered.clusters) - 1}" if discovered.clusters else "none, all items are noise"
        raise ConfigError(f"--cluster is {cluster}; the clusters in {directory} are {known}")
    found = discovered.clusters[cluster]
    return Answer(found.to_dict(), json, text="\n".join(_cluster_lines(found, len(discovered.labels), width)))


def discovery_answer(discovered: Discovered, json: bool) -> Answer:
    """All clusters: a line each as text, everything as JSON."""
    figures = discovered.to_dict()
    counts = {name: figures[name] for name in ("layer", "items", "clustered", "noise")}
    head = {"view": figures["view"], **_given(discovered.details), **counts}
    lines = [_row(cluster, len(discovered.labels)) for cluster in discovered.clusters]
    known = {key for line in lines for key, value in line.items() if value is not None}
    shown = [{key: value for key, value in line.items() if key in known} for line in lines]
    text = summary_text({**head, "clusters": shown})
    if not discovered.clusters:
        text += "\nno cluster: all items are noise; a lower --min-cluster-size or --min-samples finds smaller ones"
    return Answer(figures, json, text=text)


def _given(details: dict[str, Any]) -> dict[str, str]:
    """How many prompts or pairs there were, and what became of them; {} where that is not known."""
    if counts := details.get("prompts"):
        states = ", ".join(f"{count:,} {state}" for state, count in counts.items())
        return {"asked": f"{sum(counts.values()):,} ({states})"}
    if rows := details.get("rows"):
        fates = ", ".join(f"{rows[name]:,} {words}" for name, words in _ROWS.items() if rows.get(name))
        return {"pairs": f"{rows['rows']:,} ({fates})"}
    return {}


def _row(cluster: DescribedCluster, items: int) -> dict[str, object]:
    """One line of the table; None for what is not known."""
    strongest = next(iter(cluster.enrichment), None)
    return {
        "cluster": cluster.number,
        "size": cluster.size,
        "share": f"{cluster.size / items:.1%}",
        "cosine": cluster.cosine_median,
        "stability": _stability(cluster) if cluster.stability is not None else None,
        "flagged": cluster.flagged if cluster.verdicts is not None else None,
        "most enriched in": _value(strongest) if strongest is not None else None,
        "name": cluster.name,
    }


def _stability(cluster: DescribedCluster) -> str:
    assert cluster.stability is not None
    return f"{cluster.stability.jaccard:.2f} {cluster.stability.grade}"


def _value(enrichment: Enrichment) -> str:
    """A value with its shares inside and outside."""
    shares = f"{enrichment.share_inside:.0%} against {enrichment.share_outside:.0%}"
    of = " of its datapoints" if enrichment.among == "datapoints" else ""
    return f"{enrichment.column} {shorten(enrichment.value or '(none)', 40)}: {shares}{of}"


def _cluster_lines(cluster: DescribedCluster, items: int, width: int) -> Iterator[str]:
    name = f": {cluster.name}" if cluster.name else ""
    yield f"cluster {cluster.number}{name}{'  (flagged)' if cluster.flagged else ''}"
    yield f"  {cluster.size:,} of {items:,} items, persistence {cluster.persistence:.3f}"
    if cluster.direction is not None and cluster.cosine_median is not None:
        yield (
            f"  direction {cluster.direction}: cosine of the members {cluster.cosine_median:.3f} (median), "
            f"{cluster.cosine_low:.3f} (5th percentile)"
        )
    if cluster.stability is not None:
        found = cluster.stability
        yield (
            f"  stability {_stability(cluster)}: lowest {found.lowest:.2f}; of {found.runs} runs {found.recovered} "
            f"recovered and {found.dissolved} dissolved it"
        )
    if cluster.verdicts is not None:
        yield from (f"  {line.strip()}" for line in summary_text(cluster.verdicts).splitlines())
    if cluster.enrichment:
        yield "enriched in"
        yield from table_lines([_enrichment_row(one) for one in cluster.enrichment])
    if cluster.exemplars:
        yield "exemplars"
    for exemplar in cluster.exemplars:
        cosine = "" if exemplar.cosine is None else f"  cosine {exemplar.cosine:+.3f}"
        yield f"  {exemplar.item}  probability {exemplar.probability:.2f}{cosine}"
        yield from _texts(exemplar.texts, width)
    if cluster.top_datapoints:
        yield "top datapoints"
    for datapoint in cluster.top_datapoints:
        yield f"  row {datapoint.row}  cosine {datapoint.cosine:+.3f}  {datapoint.source}".rstrip()
        yield from _texts(datapoint.texts, width)


def _enrichment_row(enrichment: Enrichment) -> dict[str, str]:
    low, high = enrichment.share_inside_interval
    return {
        "among": enrichment.among,
        "column": enrichment.column,
        "value": shorten(enrichment.value or "(none)", 40),
        "inside": f"{enrichment.inside:,} of {enrichment.inside_total:,}",
        "share": f"{enrichment.share_inside:.1%}",
        "(interval)": f"({low:.1%} - {high:.1%})",
        "outside": f"{enrichment.share_outside:.1%}",
        "ratio": "-" if enrichment.ratio is None else f"{enrichment.ratio:.2f}",
        "p": f"{enrichment.p_value:.2g}",
        "q": f"{enrichment.q_value:.2g}",
    }


def _texts(texts: dict[str, str], width: int) -> Iterator[str]:
    for side, text in texts.items():
        yield f"    {side:>8}: {shorten(text, width)}"
