"""A discovery on disk: what is written is read, half a product is none, damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairtrace.engine.discovery import product
from pairtrace.engine.discovery.product import View, read_product, write_product
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.errors import ConfigError, DataError, DataFormatError, PairtraceError
from tests.engine.discovery.discoveries import make_cluster, make_discovery
from tests.engine.small_store import make_store, reference_cosine

FILES = ["clusters.json", "directions.safetensors", "members.parquet"]


@pytest.mark.parametrize("view", ["pairs", "prompts"])
def test_what_is_written_is_read(tmp_path: Path, view: View) -> None:
    made = make_discovery(view, details={"deep": {"list": [1, 2.5, None]}})
    write_product(tmp_path / "new" / "out", made)
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == FILES
    found = read_product(tmp_path / "new" / "out")
    assert found.clusters == made.clusters
    assert found.to_dict() == made.to_dict()
    for name in ("items", "labels", "probabilities", "cosines", "directions"):
        given, read = getattr(made, name), getattr(found, name)
        assert given.dtype == read.dtype
        np.testing.assert_array_equal(given, read)


def test_the_same_discovery_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_product(tmp_path / name, make_discovery())
    assert [(tmp_path / "a" / name).read_bytes() for name in FILES] == [
        (tmp_path / "b" / name).read_bytes() for name in FILES
    ]


def test_members_are_a_table_for_everybody(tmp_path: Path) -> None:
    write_product(tmp_path, make_discovery("prompts"))
    table = pq.read_table(tmp_path / "members.parquet")
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == {
        "item": pa.string(),
        "cluster": pa.int32(),
        "probability": pa.float32(),
        "cosine": pa.float32(),
    }
    assert table["cluster"].to_pylist() == [0, 1, 0, -1, 0, 1, 0, -1, -1, 1]


def test_directions_are_scored(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    made = make_discovery()
    write_product(tmp_path / "out", made)
    score(
        ScoreConfig(
            store=store.path,
            directions=(str(tmp_path / "out" / "directions.safetensors"),),
            out=str(tmp_path / "scores.parquet"),
        )
    )
    table = pq.read_table(tmp_path / "scores.parquet")
    for number in range(2):
        expected = reference_cosine(store.rows[5], made.directions[number])
        found = [np.nan if value is None else value for value in table[f"score:cluster-{number}"].to_pylist()]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_directions_do_not_fit_a_store_of_another_model(tmp_path: Path) -> None:
    store = make_store(tmp_path, model_fingerprint="9" * 64)
    write_product(tmp_path / "out", make_discovery())
    config = ScoreConfig(
        store=store.path,
        directions=(str(tmp_path / "out" / "directions.safetensors"),),
        out=str(tmp_path / "scores.parquet"),
    )
    with pytest.raises(PairtraceError, match="was made from the model with fingerprint 1111"):
        score(config)


def test_noise_only(tmp_path: Path) -> None:
    made = make_discovery(
        clusters=(),
        labels=np.full(10, -1, np.int32),
        probabilities=np.zeros(10, np.float32),
        cosines=np.full(10, np.nan, np.float32),
        directions=np.zeros((0, 24), np.float32),
    )
    write_product(tmp_path, make_discovery())
    write_product(tmp_path, made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters.json", "members.parquet"]
    found = read_product(tmp_path)
    assert found.clusters == ()
    assert found.to_dict()["noise"] == 10


def test_a_cluster_without_direction(tmp_path: Path) -> None:
    clusters = (make_cluster("pairs", 0, 4, direction=None, cosine_median=None), make_cluster("pairs", 1, 3))
    made = make_discovery(clusters=clusters)
    made.directions[0] = 0
    write_product(tmp_path, made)
    found = read_product(tmp_path)
    np.testing.assert_array_equal(found.directions, made.directions)


@pytest.mark.parametrize("broken", ["_write_members", "save_directions", "library_versions"])
def test_a_run_that_ends_in_between_leaves_no_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def end(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    write_product(tmp_path, make_discovery(seed=1))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(product, broken, end)
        write_product(tmp_path, make_discovery(seed=2))
    with pytest.raises(DataError, match=r"unfinished discovery: .* is written last, is not there"):
        read_product(tmp_path)
    made = make_discovery(seed=2)
    write_product(tmp_path, made)
    np.testing.assert_array_equal(read_product(tmp_path).cosines, made.cosines)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = json.loads((directory / "clusters.json").read_text())
        change(content)
        (directory / "clusters.json").write_text(json.dumps(content))

    return apply


def other_run(name: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        write_product(directory / "other", make_discovery(seed=9))
        (directory / "other" / name).replace(directory / name)

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "members of another run": (other_run("members.parquet"), DataFormatError, "comes from another run"),
    "directions of another run": (other_run("directions.safetensors"), DataFormatError, "comes from another run"),
    "clusters of another run": (other_run("clusters.json"), DataFormatError, "comes from another run"),
    "no members": (lambda path: (path / "members.parquet").unlink(), DataFormatError, "members.parquet is missing"),
    "no directions": (
        lambda path: (path / "directions.safetensors").unlink(),
        DataFormatError,
        "directions.safetensors is missing",
    ),
    "a bit": (
        lambda path: (path / "members.parquet").write_bytes((path / "members.parquet").read_bytes()[:-9] + b"\0" * 9),
        DataFormatError,
        "has sha256 .*, expected ",
    ),
    "half of it": (
        lambda path: (path / "clusters.json").write_text((path / "clusters.json").read_text()[:300]),
        DataFormatError,
        "clusters.json cannot be read",
    ),
    "no JSON object": (lambda path: (path / "clusters.json").write_text("[]"), DataFormatError, "version None"),
    "another version": (edit(lambda content: content.update(schema_version=2)), DataFormatError, "2; expected 1"),
    "no list of files": (edit(lambda content: content.pop("files")), DataFormatError, "list of files is None"),
    "a path outside": (
        edit(lambda content: content["files"].update({"../x": "0"})),
        DataFormatError,
        "list of files",
    ),
    "no settings": (edit(lambda content: content.pop("settings")), DataFormatError, "damaged.*'settings'"),
    "another field": (
        edit(lambda content: content["clusters"][0].update(extra=1)),
        DataFormatError,
        "damaged.*unexpected keyword",
    ),
    "a cluster less": (edit(lambda content: content["clusters"].pop()), DataFormatError, "not those that"),
    "another name": (
        edit(lambda content: content["clusters"][1].update(direction="cluster-7")),
        DataFormatError,
        r"holds \['cluster-0', 'cluster-1'\]; expected \['cluster-0', 'cluster-7'\]",
    ),
    "another layer": (edit(lambda content: content.update(layer=6)), DataFormatError, "holds no layer 6"),
    "nothing": (
        lambda path: [file.unlink() for file in path.iterdir()],
        DataError,
        "there is no discovery in .*pairtrace discover wrote",
    ),
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    write_product(tmp_path, make_discovery())
    damage, error, message = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(error, match=message):
        read_product(tmp_path)


def test_no_such_directory(tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="there is no discovery in"):
            read_product(place)
    with pytest.raises(ConfigError, match="cannot write"):
        write_product(tmp_path / "file", make_discovery())
