"""The benchmarks run in their small form, and the README's tables can be made of what they write."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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
        ("bench_discover", "discover_table", ("3,000",)),
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


def test_the_table_of_vllm(tables: Any) -> None:
    """Its benchmark needs an environment of its own, so the record is made up here."""
    row = {
        "lowest": 1.0, "highest": 2.0, "useful_tokens_per_second": 4000.0, "times_faster": 2.5, "bytes_out": 12345,
        "peak_memory_bytes": None, "relative_maximum_error": 3e-4,
    }  # fmt: skip
    rates = {"transformers": {"tokens_per_second": 100.0}, "vLLM": {"tokens_per_second": 300.0}}
    content = {
        "results": {"stock vLLM": {**row, "peak_memory_bytes": 5 << 30}, "pairtrace": row, "rollouts": rates},
        "workload": {
            "pairs": 64, "data": ["a", "b"], "useful_tokens": 6000, "shape": "s", "layer": 5, "blocks": 8,
            "dtype": "float32", "clock": "processor", "bytes_share_of_long_pairs": 0.004, "sequences": 256,
            "new_tokens": 64, "rollout_speed_up": 3.0, "threads": 1, "prompt_tokens": 100,
        },
        "hardware": {"processor": "P", "cores": 2}, "date": "2026-11-28T00:00:00", "claims": [],
    }  # fmt: skip
    lines = tables.vllm_table(content).splitlines()
    assert {line.count("|") for line in lines if line.startswith("|")} == {7}
    assert lines[3] == "| **pairtrace** | 4,000 (3,000 to 6,000) | 2.50x | 0.0123 |  | 3e-04 |"
    assert "5,120" in lines[2] and "0.40% of stock's bytes" in lines[-1] and "(3.00x)" in lines[-1]


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


@pytest.fixture
def attribution(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the attribution benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("arms", "report", "statistics", "tables", "tasks")
    return SimpleNamespace(**{name: importlib.import_module(f"attribution_{name}") for name in names})


def test_rates_are_means_and_their_intervals_cover_the_spread_between_seeds(attribution: Any) -> None:
    def runs(*shares: float) -> list[list[np.ndarray]]:
        return [[(np.arange(100) < 100 * share).astype(float) for _ in range(3)] for share in shares]

    found = attribution.statistics.rates({"none": runs(0.6, 0.6, 0.6), "edit": runs(0.0, 0.1, 0.2)}, draws=500)
    assert found["none"].value == pytest.approx(0.6) and found["edit"].value == pytest.approx(0.1)
    narrow, wide = (found[name].interval for name in ("none", "edit"))
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * (0.24 / 300) ** 0.5, rel=0.3), "prompts of three seeds"
    assert wide[0] < 0.04 and wide[1] > 0.16, "seeds as well"
    reduction = found["edit"].reduction_from(found["none"])
    assert reduction.value == pytest.approx(1 - 0.1 / 0.6)
    assert reduction.interval[0] < reduction.value < reduction.interval[1]
    assert np.isnan(found["edit"].reduction_from(found["none"].minus(found["none"])).value)


def test_missing_verdicts_are_left_out_of_a_rate(attribution: Any) -> None:
    letters = attribution.report.letters
    found = attribution.statistics.rates({"none": [[letters("11?0")], [letters("?1?0")]]}, draws=50)
    assert found["none"].value == pytest.approx(3 / 5)


def test_a_ranking_is_compared_over_the_same_resampled_pairs(attribution: Any) -> None:
    rng = np.random.default_rng(0)
    kinds = [np.repeat(["planted", "over_refusal", "other"], [20, 30, 150]) for _ in range(3)]
    good = [(kind == "planted") + 0.4 * rng.standard_normal(200) for kind in kinds]
    found = attribution.statistics.ranking_quality(
        {"good": good, "same": good, "chance": [rng.standard_normal(200) for _ in kinds]}, kinds, draws=60
    )
    gap = found["good"]["precision_at_k"].minus(found["chance"]["precision_at_k"])
    assert gap.interval[0] > 0.3
    assert found["good"]["precision_at_k"].minus(found["same"]["precision_at_k"]).interval == (0.0, 0.0)
    low, high = found["good"]["roc_auc"].interval
    assert low < found["good"]["roc_auc"].value < high <= 1


def _tasks(attribution: Any, **changed: Any) -> list[Any]:
    task = attribution.tasks.Task
    return [
        task(name="a/first", function="task_functions:double", arguments={"number": 3, **changed}),
        task(name="a/second", function="task_functions:add", needs=("a/first",)),
        task(name="b/broken", function="task_functions:fail"),
        task(name="b/never", function="task_functions:add", needs=("b/broken",)),
    ]


def test_tasks_run_once_and_a_failed_one_stops_only_those_that_need_it(
    attribution: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "task_functions.py").write_text(
        "def double(work, needs, *, number):\n    return {'value': 2 * number}\n"
        "def add(work, needs):\n    return {'value': 1 + sum(one['value'] for one in needs.values())}\n"
        "def fail(work, needs):\n    raise ValueError('broken')\n"
    )
    run, work = attribution.tasks.run_tasks, tmp_path / "work"
    done, failed = run(_tasks(attribution), work, 1)
    assert {name: one["result"] for name, one in done.items()} == {"a/first": {"value": 6}, "a/second": {"value": 7}}
    assert failed == ["b/broken", "b/never"]
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}
    run(_tasks(attribution)[:2], work, 1)
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}, "finished tasks are kept"
    done, _ = run(_tasks(attribution, number=4)[:2], work, 1)
    assert done["a/second"]["result"] == {"value": 9}, "other arguments reach all that depends on them"


def test_arms_know_their_control(attribution: Any) -> None:
    arm = attribution.arms.Arm
    assert arm(method="none").name == "none"
    half = arm(method="pairtrace", action="filter", size="k/2")
    assert (half.name, half.control) == ("pairtrace filter k over 2", "random filter k over 2")
    assert arm(method="pairtrace", action="drop-sources").control == "random filter sources"


def steered(control: bool, low: float, high: float) -> dict[str, Any]:
    difference = {"value": (low + high) / 2, "low": low, "high": high}
    return {"mode": "add", "control": control, "scale": 0.5, "difference": difference}


def test_random_vectors_are_averaged_before_organisms_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    steered_over = importlib.import_module("probe_training_report")._steered

    def arm(control: bool, scale: float | None, change: float | None) -> dict[str, Any]:
        difference = None if change is None else {"value": change}
        one = {"value": 0.4 + (change or 0)}
        way = {"mode": "none" if change is None else "add", "control": control, "scale": scale}
        return {**way, "rate": one, "difference": difference, "surprise": {"value": 0.3}}

    found = steered_over(
        [
            [arm(False, None, None), arm(False, 0.5, own), arm(True, 0.5, -0.1), arm(True, 0.5, 0.04)]
            for own in (0.2, 0.3)
        ]
    )
    assert [(one["mode"], one["control"], one["scale"]) for one in found] == [
        ("none", False, None),
        ("add", False, 0.5),
        ("add", True, 0.5),
    ]
    assert found[0]["difference"] is None and found[0]["farthest"] is None
    assert found[1]["difference"]["value"] == pytest.approx(0.25)
    assert found[1]["difference"]["high"] - 0.25 == pytest.approx(12.706 * 0.05, rel=1e-3), (
        "Student's, of two organisms"
    )
    assert found[2]["difference"]["value"] == pytest.approx(-0.03) and found[2]["farthest"] == -0.1
    assert found[2]["difference"]["high"] == pytest.approx(-0.03), "the spread between random vectors is not in it"


def test_claims_of_training_against_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the paper found may hold or not; the interval of a steered rate has to lie on the right side of 0."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    claims_of = importlib.import_module("probe_training_report").claims_of

    def arm(training: float, retrained: float, helpful: float) -> dict[str, Any]:
        kept = {"training": {"value": training}, "retrained": {"value": retrained}}
        return {"kept": kept, "changes": {"helpful": {"value": helpful}}}

    results = {
        "arms": {
            "sft-probe": arm(0.6, 0.97, -0.08),
            "dpo-probe": arm(0.9, 0.9, -0.01),
            "dpo-ensemble": arm(0.93, 1, 0),
        },
        "cut": {name: {"value": cut} for name, cut in (("sft-probe", 0.3), ("dpo-probe", 0.7), ("dpo-ensemble", 0.7))},
        "steering": {
            "behavior": {
                "m0": [{"difference": None}, steered(False, -0.1, 0.1)],
                "m1": [{"difference": None}, steered(False, -0.3, 0.1)],
            },
            "shift": {
                "m0": [{"difference": None}, steered(False, 0.1, 0.4), steered(True, 0.02, 0.2)],
                "m1": [{"difference": None}, steered(False, -0.3, -0.1), steered(True, -0.1, 0.1)],
            },
        },
        "minutes": 20.0,
    }
    held = {claim.name: claim.holds for claim in claims_of(results)}
    assert held == {
        "sft-probe: share of the behaviour cut": False,
        "sft-probe: helpfulness lost, points": False,
        "sft-probe: ROC-AUC of retrained probes, share of the former": True,
        "dpo-probe: share of the behaviour cut": True,
        "dpo-probe: helpfulness lost, points": True,
        "dpo-probe: ROC-AUC of retrained probes, share of the former": False,
        "DPO keeps more of the training probe's ROC-AUC than SFT, by": True,
        "dpo-ensemble: what it adds to the ROC-AUC kept": True,
        "the vector over responses added to M0: near end of the change's interval": False,
        "the vector over responses projected out of M1: near end of the change's interval": False,
        "the shift added to M0: near end of the change's interval": True,
        "random vectors like the shift added to M0: near end of the change's interval": False,
        "the shift projected out of M1: near end of the change's interval": True,
        "random vectors like the shift projected out of M1: near end of the change's interval": True,
        "minutes of the whole benchmark": True,
    }
