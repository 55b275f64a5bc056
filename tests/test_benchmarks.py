"""The benchmarks run in their small form, and the README's tables can be made of what they write."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("speed_tables")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("harness")


def run_quick(name: str, out: Path, folder: Path) -> dict[str, Any]:
    place = [] if name == "bench_cosine" else ["--dir", str(folder)]
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--out", str(out), *place]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return content


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "table", "rows"),
    [
        ("bench_cosine", "cosine_table", ("**pairtrace**", "torch matmul + norm", "**pairtrace, scaled int8**")),
        ("bench_reuse", "reuse_table", ("1", "2", "10", "100")),
        ("bench_score_store", "score_table", ("process start-up, apart", "6,144 rows, page cache")),
        ("bench_store", "store_table", ("np.memmap", "**pairtrace**", "pairtrace, zstd:3", "zarr, crc32c")),
    ],
)
def test_the_small_form_makes_a_table(
    name: str, table: str, rows: tuple[str, ...], tables: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    content = run_quick(name, tmp_path / "record.json", folder)
    assert content["benchmark"] == name and content["quick"] and content["hardware"] and content["results"]
    assert content["claims"] == [], "a small form claims nothing"
    lines = getattr(tables, table)(content).splitlines()
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1, "every row has all columns"
    assert {line.split("|")[1].strip() for line in lines if line.startswith("|")} >= set(rows)
    assert not folder.exists() or not list(folder.iterdir()), "temporary data is removed"


def test_missed_targets_are_told(tables: Any) -> None:
    claims = [
        {"name": "speed", "value": 0.5, "target": 0.9, "holds": False},
        {"name": "memory", "value": 5.0, "target": 7.0, "holds": True},
    ]
    assert tables.missed({"claims": claims}) == " Missed targets: speed 0.50 (target 0.9)."
    assert "All 1 targets" in tables.missed({"claims": claims[1:]})


def test_rounds_are_interleaved_and_compared_with_their_neighbours(harness: Any) -> None:
    order: list[str] = []
    ticks = iter([0.0, 2.0, 2.0, 3.0, 3.0, 43.0, 43.0, 63.0])
    calls = {name: lambda name=name: order.append(name) for name in ("slow", "fast")}
    timings = harness.interleave(
        calls, 2, clock=lambda: next(ticks), before=lambda name: order.append(f"before {name}")
    )
    one_round = ["before slow", "slow", "before fast", "fast"]
    assert order == one_round * 3, "a round to warm up and two that count"
    assert timings["slow"].runs == (2.0, 40.0) and timings["fast"].runs == (1.0, 20.0)
    assert timings["slow"].over(timings["fast"]) == 2.0


def test_too_little_disk_is_told_before_anything_is_written(harness: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match=r"GB free and this benchmark needs .* --dir"),
        harness.workspace(tmp_path, 1 << 60),
    ):
        pytest.fail("there is no such disk")
    assert not list(tmp_path.iterdir())
