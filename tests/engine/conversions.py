"""Conversions and behaviour files for the tests of `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pairtrace.engine.convert import ConvertConfig, ConvertSummary, convert
from pairtrace.engine.directions import Direction, save_directions
from tests.engine.small_store import MODEL, TEMPLATE, TOKENIZER, any_values


def run(source: Path | str, out: Path | str, **settings: Any) -> ConvertSummary:
    return convert(ConvertConfig(source=str(source), out=str(out), fsync=False, **settings))


def behavior_file(path: Path, layers: tuple[int, ...] = (2, 5), width: int = 24, **changes: Any) -> str:
    made = [
        Direction(
            name=name,
            layer=layer,
            values=any_values(seed + layer, count, width),
            kind="vector" if count == 1 else "bank",
            origin="test",
            **{
                "model_fingerprint": MODEL,
                "tokenizer_fingerprint": TOKENIZER,
                "template_fingerprint": TEMPLATE,
                **changes,
            },
        )
        for layer in layers
        for name, count, seed in (("harm", 1, 10), ("bank", 3, 20))
    ]
    save_directions(path, made, {})
    return str(path)
