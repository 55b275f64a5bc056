from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from pairtrace.errors import ConfigError, StoreDamagedError, StoreMismatchError, StoreSchemaError
from pairtrace.store.manifest import IDENTITY, Manifest
from pairtrace.store.reuse import compatible
from tests.store.samples import make_manifest

OTHER: dict[str, Any] = {
    "model_fingerprint": "1" * 64,
    "tokenizer_fingerprint": "2" * 64,
    "template_fingerprint": "3" * 64,
    "data_fingerprint": "4" * 64,
    "max_length": None,
    "truncation": "keep_end",
    "pooling": "last-token",
    "dtype": "float32",
    "codec": "zstd:3",
    "converted_from": "float32",
    "compute_dtype": "bfloat16",
    "backend": "vllm",
    "layers": (2,),
    "sides": True,
    "rows": 11,
    "limit": 10,
    "width": 7,
}


@pytest.mark.parametrize("manifest", [make_manifest(), make_manifest(sides=True, max_length=None, limit=3)])
def test_json_round_trip(manifest: Manifest) -> None:
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json())), "s") == manifest


@pytest.mark.parametrize("field", IDENTITY)
def test_each_identity_field_is_compared(field: str) -> None:
    needed = make_manifest(**{field: OTHER[field]})
    with pytest.raises(StoreMismatchError) as caught:
        make_manifest().require_same(needed)
    assert caught.value.field == field
    assert caught.value.expected == OTHER[field]
    assert caught.value.actual == getattr(make_manifest(), field)
    assert repr(caught.value.actual) in str(caught.value) and repr(OTHER[field]) in str(caught.value)


def test_description_is_no_identity() -> None:
    described = {
        "created": "later",
        "versions": {},
        "data": "elsewhere",
        "model": "other name",
        "attention": "x",
        "columns": {},
        "split": "train",
        "chat_template": "a.jinja",
        "template_date": "2026-01-01",
        "data_format": "x",
        "shard_rows": 7,
        "source_store": {"path": "/a", "dtype": "float16", "codec": "none"},
    }
    make_manifest().require_same(make_manifest(**described))
    fields = {field.name for field in dataclasses.fields(Manifest)}
    assert fields == set(IDENTITY) | set(described) | {"schema_version"}, "a new field needs a decision"


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 0},
        {"width": 0},
        {"shard_rows": 0},
        {"layers": ()},
        {"layers": (5, 2)},
        {"layers": (2, 2)},
        {"layers": (-1,)},
        {"dtype": "int4"},
        {"codec": "gzip"},
        {"converted_from": "int4"},
        {"schema_version": 3},
        {"schema_version": 1, "dtype": "int8"},
        {"schema_version": 1, "codec": "zstd:3"},
        {"truncation": "middle"},
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        make_manifest(**changes)


@pytest.mark.parametrize("version", [0, 3, "1", True, None])
def test_another_schema_version(version: object) -> None:
    with pytest.raises(StoreSchemaError, match=f"schema version {version!r}.*reads versions 1 and 2"):
        Manifest.from_json({**make_manifest().to_json(), "schema_version": version}, "acts.zarr")


def test_unknown_fields_of_another_schema_are_a_schema_error() -> None:
    with pytest.raises(StoreSchemaError):
        Manifest.from_json({"schema_version": 3, "novelty": 1}, "acts.zarr")


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Manifest) if f.name != "schema_version"])
def test_damaged_fields(field: str) -> None:
    whole = make_manifest().to_json()
    if field not in ("source_store", "backend"):  # only converted stores, and those of another back end, have it
        with pytest.raises(StoreDamagedError, match=field):
            Manifest.from_json({key: value for key, value in whole.items() if key != field}, "acts.zarr")
    with pytest.raises(StoreDamagedError, match=field):
        Manifest.from_json({**whole, field: 1.5}, "acts.zarr")


def test_the_source_of_a_conversion_is_kept_where_there_is_one() -> None:
    assert "source_store" not in make_manifest().to_json() and not make_manifest().converted
    source = {"path": "/data/acts.zarr", "dtype": "float16", "codec": "none"}
    converted = make_manifest(source_store=source)
    assert converted.converted and Manifest.from_json(converted.to_json(), "s") == converted
    older = make_manifest(converted_from="float16")
    assert older.converted and Manifest.from_json(older.to_json(), "s").source_store is None
    for damaged in ({}, {"path": "/a"}, {**source, "path": 3}, {**source, "more": "x"}, [], "x"):
        with pytest.raises(StoreDamagedError, match="source_store"):
            Manifest.from_json({**converted.to_json(), "source_store": damaged}, "s")


def test_another_back_end_is_recorded_and_never_resumed_or_reused() -> None:
    """The usual one is not written: readers from before there was a choice know nothing of it."""
    usual, other = make_manifest(), make_manifest(backend="vllm")
    assert "backend" not in usual.to_json() and Manifest.from_json(usual.to_json(), "s").backend == "hf"
    assert Manifest.from_json(other.to_json(), "s") == other
    for check in (Manifest.require_same, compatible):
        with pytest.raises(StoreMismatchError, match="backend is 'hf', but 'vllm' is needed"):
            check(usual, other)


def test_schema_1_is_what_it_was() -> None:
    """Neither more fields than its readers know, nor any that they would miss."""
    newer = {"codec", "split", "chat_template", "template_date", "converted_from"}
    old, new = make_manifest(schema_version=1), make_manifest()
    assert set(new.to_json()) - set(old.to_json()) == newer
    assert Manifest.from_json(old.to_json(), "s") == old
    old.require_same(new)
    with pytest.raises(StoreMismatchError, match="codec is 'none', but 'zstd:3' is needed"):
        old.require_same(make_manifest(codec="zstd:3"))
    with pytest.raises(StoreDamagedError, match="unknown fields"):
        Manifest.from_json({**old.to_json(), "codec": "none"}, "s")
    with pytest.raises(StoreDamagedError, match="no dtype int8"):
        Manifest.from_json({**old.to_json(), "dtype": "int8"}, "s")


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_a_manifest_that_is_no_object(value: object) -> None:
    with pytest.raises(StoreDamagedError, match="not a JSON object"):
        Manifest.from_json(value, "acts.zarr")


def test_booleans_and_odd_layers_are_not_numbers() -> None:
    for change in ({"rows": True}, {"layers": [2, "5"]}, {"layers": [True]}):
        with pytest.raises(StoreDamagedError):
            Manifest.from_json({**make_manifest().to_json(), **change}, "acts.zarr")


@pytest.mark.parametrize("module", ["manifest", "reader", "writer", "verify", "reuse"])
def test_importing_the_room_loads_nothing_heavy(module: str) -> None:
    heavy = ("zarr", "numcodecs", "torch", "transformers", "numba", "fsspec")
    code = f"import sys, pairtrace.store.{module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
