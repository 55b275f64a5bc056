"""What a discovery leaves in its directory, and how it is read again.

`members.parquet` says which item belongs to which cluster, `directions.safetensors` holds a cluster's mean direction as
a behaviour that `pairtrace score` takes, `clusters.json` all the rest. It is written last and holds the checksums of
the others: where it is, the product is complete. Letters: n items, C clusters, D width.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairtrace.engine.atomic import replacing, require_writable
from pairtrace.engine.directions import Direction, load_directions, save_directions
from pairtrace.engine.discovery.enrichment import Enrichment
from pairtrace.engine.discovery.exemplars import Datapoint, Exemplar
from pairtrace.engine.discovery.stability import Stability
from pairtrace.engine.tables import file_digest
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ConfigError, DataError, DataFormatError, PairtraceError

View = Literal["pairs", "prompts"]
SCHEMA_VERSION = 1
CLUSTERS_FILE, MEMBERS_FILE, DIRECTIONS_FILE = "clusters.json", "members.parquet", "directions.safetensors"
_FINGERPRINTS = ("model_fingerprint", "tokenizer_fingerprint", "template_fingerprint")
_MEMBERS: dict[str, pa.DataType] = {"cluster": pa.int32(), "probability": pa.float32(), "cosine": pa.float32()}


@dataclass(frozen=True, kw_only=True)
class DescribedCluster:
    """One cluster and what is known of it.

    Attributes:
        number: from 0, the largest first.
        size: number of members.
        persistence: share of the possible persistence in the hierarchy.
        direction: name of its mean direction in the direction file; None where the mean is zero.
        cosine_median, cosine_low: median and 5th percentile of the members' cosines with it; None without one.
        exemplars: the most typical members first.
        top_datapoints: highest cosine first.
        enrichment: smallest q-value first.
        stability: None where it was not measured, or the cluster is too small for the sample that was drawn.
        name: proposed by a judge; None without one.
        verdicts: how the verdicts on the prompts' answers changed, "flagged" among it; None where nothing was judged.
    """

    number: int
    size: int
    persistence: float
    direction: str | None
    cosine_median: float | None
    cosine_low: float | None
    exemplars: tuple[Exemplar, ...] = ()
    top_datapoints: tuple[Datapoint, ...] = ()
    enrichment: tuple[Enrichment, ...] = ()
    stability: Stability | None = None
    name: str | None = None
    verdicts: dict[str, Any] | None = None

    @property
    def flagged(self) -> bool:
        """Whether the verdicts changed beyond chance."""
        return bool(self.verdicts and self.verdicts.get("flagged"))

    def to_dict(self) -> dict[str, Any]:
        """The cluster as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> DescribedCluster:
        """The inverse of `to_dict`; TypeError or KeyError where it is something else."""
        enrichment = (
            Enrichment(**{**one, "share_inside_interval": tuple(one["share_inside_interval"])})
            for one in content["enrichment"]
        )
        return cls(
            **{
                **content,
                "exemplars": tuple(Exemplar(**one) for one in content["exemplars"]),
                "top_datapoints": tuple(Datapoint(**one) for one in content["top_datapoints"]),
                "enrichment": tuple(enrichment),
                "stability": None if content["stability"] is None else Stability(**content["stability"]),
            }
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Discovered:
    """A whole discovery.

    Attributes:
        view: "pairs" or "prompts".
        layer: residual layer of the directions.
        clusters: C clusters, by number.
        items: what was clustered: int64 [n] rows of the store, or object [n] ids of prompts.
        labels: int32 [n], number of the cluster, -1 for noise.
        probabilities: float32 [n], how firmly an item belongs to its cluster; 0 for noise.
        cosines: float32 [n], with the mean direction of the item's own cluster; NaN for noise.
        directions: float32 [C, D], mean directions; zero for a cluster without one.
        inputs: what it was made from, plain JSON values; "model_fingerprint", "tokenizer_fingerprint" and
            "template_fingerprint" become those of the direction file.
        settings: of the run, plain JSON values.
        details: further figures of the run, plain JSON values.
    """

    view: View
    layer: int
    clusters: tuple[DescribedCluster, ...]
    items: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    cosines: np.ndarray
    directions: np.ndarray
    inputs: dict[str, Any]
    settings: dict[str, Any]
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All but the arrays, as plain JSON values."""
        clustered = int(np.count_nonzero(self.labels >= 0))
        return {
            "schema_version": SCHEMA_VERSION,
            "view": self.view,
            "layer": self.layer,
            "items": len(self.labels),
            "clustered": clustered,
            "noise": len(self.labels) - clustered,
            "clusters": [cluster.to_dict() for cluster in self.clusters],
            "inputs": self.inputs,
            "settings": self.settings,
            "details": self.details,
        }


def direction_name(number: int) -> str:
    """Name of a cluster's mean direction."""
    return f"cluster-{number}"


def require_directory(out: str | Path) -> None:
    """Find out before any work that a product can be written; nothing is made.

    Raises:
        ConfigError: it cannot.
    """
    if Path(out).exists() and not Path(out).is_dir():
        raise ConfigError(f"--out is {out}, which is a file; expected a directory, which is made if needed")
    require_writable(Path(out) / CLUSTERS_FILE)


def write_product(out: str | Path, discovered: Discovered) -> None:
    """Write a discovery into a directory, in place of one that is there.

    A run that is killed meanwhile leaves a directory without `clusters.json`, which `read_product` refuses.

    Raises:
        ConfigError: a file cannot be written.
    """
    out = Path(out)
    try:
        # First of all: a product is never made of the files of two runs.
        (out / CLUSTERS_FILE).unlink(missing_ok=True)
        (out / DIRECTIONS_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error}; choose another --out") from error
    _write_members(out / MEMBERS_FILE, discovered)
    names = [MEMBERS_FILE]
    directions = _as_directions(discovered, str(out / DIRECTIONS_FILE))
    if directions:
        save_directions(out / DIRECTIONS_FILE, directions, {"discovery": discovered.view})
        names.append(DIRECTIONS_FILE)
    content = {
        **discovered.to_dict(),
        "files": {name: file_digest([out / name]) for name in names},
        "versions": library_versions(),
    }
    with replacing(out / CLUSTERS_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_product(directory: str | Path) -> Discovered:
    """Read what `write_product` wrote.

    Raises:
        DataError: there is no discovery in the directory, or the run was interrupted before it was complete.
        DataFormatError: a file is damaged or belongs to another run, or the version is another one.
    """
    directory = Path(directory)
    content = _read_clusters(directory)
    _check_files(directory, content.get("files"))
    try:
        clusters = tuple(DescribedCluster.from_dict(one) for one in content["clusters"])
        head = {name: content[name] for name in ("view", "layer", "inputs", "settings", "details")}
        files = content["files"]
    except (KeyError, TypeError) as error:
        raise DataFormatError(f"{directory / CLUSTERS_FILE} is damaged ({error!r}); discover again") from error
    members = _read_members(directory / MEMBERS_FILE, head["view"])
    labels = members["cluster"]
    sizes = np.bincount(labels[labels >= 0], minlength=len(clusters)).tolist()
    if sizes != [cluster.size for cluster in clusters] or len(labels) != content.get("items"):
        raise DataFormatError(
            f"{directory} is damaged: the members in {MEMBERS_FILE} are not those that {CLUSTERS_FILE} counts; "
            "discover again"
        )
    return Discovered(
        **head,
        clusters=clusters,
        items=members["row" if head["view"] == "pairs" else "item"],
        labels=labels,
        probabilities=members["probability"],
        cosines=members["cosine"],
        directions=_read_directions(directory, clusters, head["layer"], given=DIRECTIONS_FILE in files),
    )


def _as_directions(discovered: Discovered, origin: str) -> list[Direction]:
    prints: dict[str, Any] = {name: discovered.inputs.get(name) for name in _FINGERPRINTS}
    return [
        Direction(
            name=cluster.direction,
            layer=discovered.layer,
            values=np.asarray(discovered.directions[cluster.number : cluster.number + 1], np.float32),
            kind="vector",
            origin=origin,
            **prints,
        )
        for cluster in discovered.clusters
        if cluster.direction is not None
    ]


def _write_members(path: Path, discovered: Discovered) -> None:
    rows = discovered.view == "pairs"
    table = pa.table(
        {
            "row" if rows else "item": pa.array(discovered.items, pa.int64() if rows else pa.string()),
            "cluster": pa.array(discovered.labels, _MEMBERS["cluster"]),
            "probability": pa.array(discovered.probabilities, _MEMBERS["probability"]),
            "cosine": pa.array(discovered.cosines, _MEMBERS["cosine"]),
        }
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _read_clusters(directory: Path) -> dict[str, Any]:
    path = directory / CLUSTERS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        begun = any((directory / name).exists() for name in (MEMBERS_FILE, DIRECTIONS_FILE))
        raise DataError(
            f"{directory} holds an unfinished discovery: {CLUSTERS_FILE}, which is written last, is not there; run the "
            "same pairtrace discover again"
            if begun
            else f"there is no discovery in {directory}: expected is the directory that pairtrace discover wrote to "
            f"(--out), with a {CLUSTERS_FILE}"
        ) from error
    except (OSError, ValueError) as error:
        raise DataFormatError(f"{path} cannot be read ({error}); discover again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise DataFormatError(f"{path} has schema version {version!r}; expected {SCHEMA_VERSION}; discover again")
    assert isinstance(content, dict)
    return content


def _check_files(directory: Path, files: Any) -> None:
    if not isinstance(files, dict) or MEMBERS_FILE not in files or not set(files) <= {MEMBERS_FILE, DIRECTIONS_FILE}:
        raise DataFormatError(f"{directory / CLUSTERS_FILE} is damaged: its list of files is {files!r}; discover again")
    for name, expected in files.items():
        actual = None
        with suppress(OSError):
            actual = file_digest([directory / name])
        if actual != expected:
            found = "is missing or cannot be read" if actual is None else f"has sha256 {actual}, expected {expected}"
            raise DataFormatError(
                f"{directory / name} {found}: it is damaged or comes from another run; discover again"
            )


def _read_members(path: Path, view: str) -> dict[str, np.ndarray]:
    names = ["row" if view == "pairs" else "item", *_MEMBERS]
    try:
        table = pq.read_table(path, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise DataFormatError(f"{path} cannot be read ({error}); discover again") from error
    if table.column_names != names:
        raise DataFormatError(f"{path} has the columns {table.column_names}; expected {names}; discover again")
    return {name: table.column(name).to_numpy() for name in names}


def _read_directions(directory: Path, clusters: tuple[DescribedCluster, ...], layer: int, *, given: bool) -> np.ndarray:
    """float32 [C, D]; D is 0 where no cluster has a direction."""
    if not given:
        return np.zeros((len(clusters), 0), np.float32)
    path = directory / DIRECTIONS_FILE
    try:
        by_name = {one.name: one.values[0] for one in load_directions(path, layer=layer)}
    except PairtraceError as error:
        raise DataFormatError(f"{path} cannot be used ({error}); discover again") from error
    expected = {cluster.direction for cluster in clusters if cluster.direction is not None}
    if set(by_name) != expected:
        raise DataFormatError(f"{path} holds {sorted(by_name)}; expected {sorted(expected)}; discover again")
    directions = np.zeros((len(clusters), len(next(iter(by_name.values())))), np.float32)
    for cluster in clusters:
        if cluster.direction is not None:
            directions[cluster.number] = by_name[cluster.direction]
    return directions
