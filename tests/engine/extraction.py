"""What the tests of extraction share: settings, small files, the bytes of a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pairtrace.engine.extract import ExtractConfig
from tests.models import HH


def config_for(model: Path, store: Path, **changes: Any) -> ExtractConfig:
    settings = {"data": str(HH), "max_length": 200, "limit": 150, "shard_rows": 16, "fsync": False, **changes}
    return ExtractConfig(model=str(model), layers=(2, 4), store=str(store), device="cpu", **settings)


def contents(path: Path) -> dict[str, bytes]:
    """Every chunk of a store, by name; the manifest apart (it carries the time of creation)."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("c/**/*"))
        if file.is_file() and not file.name.endswith(".partial")
    }


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    def say(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return {
        "prompt": say("user", prompt),
        "chosen": say("assistant", chosen),
        "rejected": say("assistant", rejected),
        **more,
    }
