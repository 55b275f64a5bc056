"""The command that a refused, incomplete store prints, through the command line's own parser."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pairtrace.cli import app
from pairtrace.engine.extract import ExtractConfig
from pairtrace.engine.pairs import open_pairs
from pairtrace.store.advice import repair_advice, resume_advice, resume_command
from pairtrace.store.manifest import Manifest
from tests.store.samples import make_manifest


class Parsed(Exception):
    """Carries what the command line made of a command."""


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> ExtractConfig:
    def stop(config: ExtractConfig, *_: Any) -> None:
        raise Parsed(config)

    monkeypatch.setattr("pairtrace.engine.extract.extract", stop)
    name, *words = shlex.split(command)
    assert name == "pairtrace"
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, Parsed), result.output
    config: ExtractConfig = result.exception.args[0]
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"truncation": "keep_end"},
        {"max_length": None},
        {"max_length": 77},
        {"dtype": "bfloat16", "compute_dtype": "bfloat16"},
        {"dtype": "int8", "codec": "blosc-lz4:5"},
        {"split": "train", "chat_template": "my template.jinja", "template_date": "2026-01-31"},
        {"sides": True, "limit": 10, "layers": (0, 31)},
        {"data": "my data/it's here.jsonl", "model": "a b/c"},
        {"data_format": "ultrafeedback", "columns": dict.fromkeys(("prompt", "source")) | {"chosen": "a b"}},
    ],
)
def test_every_setting_comes_back(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_manifest(**changes)
    config = parse(resume_command(manifest, "my acts.zarr"), monkeypatch)
    same = ("data", "model", "layers", "dtype", "codec", "sides", "max_length", "truncation", "compute_dtype", "limit")
    for name in (*same, "split", "chat_template", "template_date"):
        assert getattr(config, name) == getattr(manifest, name), name
    assert (config.store, config.format) == (str(Path("my acts.zarr").absolute()), manifest.data_format)
    for name in ("prompt", "chosen", "rejected", "source"):
        assert getattr(config, name) == manifest.columns.get(name), name


ROWS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "usual names": ({"prompt": "q", "chosen": "a", "rejected": "b", "source": "web"}, {}),
    "own names": (
        {"q": "x", "good": "a", "bad": "b", "from": "web"},
        {"prompt": "q", "chosen": "good", "rejected": "bad", "source": "from"},
    ),
    "dialogues": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b", "prompt": "unused"},
        {"format": "hh-rlhf"},
    ),
    "forced format": ({"chosen": "x a", "rejected": "y b"}, {"format": "standard-implicit"}),
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_data_is_read_alike(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, options = ROWS[kind]
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps(row) + "\n")
    source = open_pairs(data, **options)  # type: ignore[arg-type]
    manifest = make_manifest(data=str(data), data_format=source.format, columns=source.columns)
    again = parse(resume_command(manifest, "s"), monkeypatch).open_source()
    assert again.fingerprint == source.fingerprint


def test_what_a_store_does_not_record_is_said() -> None:
    advice = resume_advice(make_manifest(), "acts.zarr")
    assert "--reuse" in advice and "--reuse" not in resume_command(make_manifest(), "acts.zarr")
    assert "--split" not in advice
    older = resume_advice(make_manifest(schema_version=1), "acts.zarr")
    for option in ("--split", "--chat-template", "--template-date", "--reuse"):
        assert option in older
    assert "reuse" not in Manifest.__dataclass_fields__


def test_a_converted_store_is_converted_again() -> None:
    manifest = make_manifest(dtype="int8", codec="zstd:3", converted_from="float16")
    assert resume_advice(manifest, "a b.zarr") == (
        "Convert them by running the same conversion again: "
        f"pairtrace store convert SOURCE_STORE '{Path.cwd()}/a b.zarr' --dtype int8 --codec zstd:3"
    )


def test_a_converted_store_names_its_source() -> None:
    source = {"path": "/data/my acts.zarr", "dtype": "float16", "codec": "none"}
    manifest = make_manifest(codec="zstd:3", source_store=source)
    command = "pairtrace store convert '/data/my acts.zarr' s3://bucket/b --dtype float16 --codec zstd:3"
    assert resume_command(manifest, "s3://bucket/b") == command
    assert repair_advice(manifest, "s3://bucket/b") == f"run the same conversion again: {command}"
