"""Cost records: what is measured, what an interruption leaves, what files and table say."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pairtrace.cli import app
from pairtrace.engine.cost import API, CostMeter, CostRecord, Prices, costs_path, read_costs, write_costs
from pairtrace.engine.cost_table import cost_table
from pairtrace.errors import ConfigError, DataFormatError


def record(method: str = "gradient", stage: str = "train", **changes: object) -> CostRecord:
    values = {
        "method": method,
        "stage": stage,
        "wall_seconds": 100.0,
        "device_seconds": 7200.0,
        "device": "cuda:0",
        "devices": 2,
        "model_tokens": 10,
        "flops": 5.0,
        "peak_memory_bytes": 1000,
        "api_prompt_tokens": 2_000_000,
        "api_completion_tokens": 500_000,
        **changes,
    }
    return CostRecord(**values)  # type: ignore[arg-type]


def test_money_is_device_hours_and_api_tokens() -> None:
    prices = Prices(gpu_hour=3.0, million_prompt_tokens=0.5, million_completion_tokens=8.0)
    assert record().money(prices) == pytest.approx(2 * 3.0 + 2 * 0.5 + 0.5 * 8.0)
    assert record().money(Prices()) == 0
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="--gpu-hour"):
            Prices(gpu_hour=wrong)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workers_of_a_cluster_count_with_their_own_devices(device: str) -> None:
    with CostMeter(method="m", stage="s", device="cpu") as meter:
        busy = time.process_time()
        while time.process_time() - busy < 0.05:
            pass
        for name, seconds, memory in (("a", 100.0, 1), ("b", 20.0, 1 << 60), ("a", 3.0, 2)):
            cost = record(device=device, device_seconds=seconds, peak_memory_bytes=memory)
            meter.add_worker(name, cost)
    whole = meter.record
    assert (whole.model_tokens, whole.flops, whole.devices, whole.device) == (30, 15.0, 2, device)
    assert whole.peak_memory_bytes == 1 << 60
    if device == "cpu":
        assert 123.05 <= whole.device_seconds < 124, "this process works on a CPU as well"
    else:
        assert whole.device_seconds == 123.0


def test_a_meter_counts_work_on_the_cpu(tmp_path: Path) -> None:
    path = costs_path(tmp_path / "scores.parquet")
    assert path == tmp_path / "scores.costs.jsonl" == costs_path(path)
    with CostMeter(method="m", stage="s", device="cpu", path=path) as meter:
        meter.add(tokens=3, flops=1e12)
        meter.add(tokens=4, flops=2e12)
        busy = time.process_time()
        while time.process_time() - busy < 0.05:
            pass
        before = time.process_time()
        time.sleep(0.2)
        idle = time.process_time() - before
        meter.extra["note"] = "kept"
    (kept,) = read_costs(path)
    assert kept == meter.record
    assert (kept.method, kept.stage, kept.device, kept.devices) == ("m", "s", "cpu", 1)
    assert (kept.model_tokens, kept.flops, kept.extra) == (7, 3e12, {"note": "kept"})
    # Waiting is wall time, but it does not use the processor.
    assert kept.device_seconds >= 0.05
    assert kept.wall_seconds - kept.device_seconds >= 0.15 - idle
    assert kept.peak_memory_bytes > 1 << 20


def test_an_api_holds_no_device() -> None:
    with CostMeter(method="judge", stage="score", device=API) as meter:
        meter.add(api_prompt_tokens=5, api_completion_tokens=2)
    made = meter.record
    assert (made.device_seconds, made.devices, made.peak_memory_bytes) == (0, 0, 0)
    assert (made.api_prompt_tokens, made.api_completion_tokens) == (5, 2)


def test_interrupted_and_resumed_runs_add_up(tmp_path: Path) -> None:
    path = tmp_path / "a.costs.jsonl"
    write_costs(path, [record(stage="other")])

    def run(tokens: int, *, resumed: bool, fails: bool = False) -> None:
        with CostMeter(method="gradient", stage="train", device="cpu", path=path, resumed=resumed) as meter:
            meter.add(tokens=tokens)
            if fails:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(5, resumed=False, fails=True)
    run(6, resumed=True)
    assert [(cost.stage, cost.model_tokens) for cost in read_costs(path)] == [("other", 10), ("train", 5), ("train", 6)]
    with pytest.raises(KeyboardInterrupt):
        run(0, resumed=False, fails=True)
    assert len(read_costs(path)) == 3, "a run that failed before any work replaces nothing"
    run(7, resumed=False)
    assert [(cost.stage, cost.model_tokens) for cost in read_costs(path)] == [("other", 10), ("train", 7)]


def test_a_running_stage_is_saved_soon_and_then_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process leaves that is killed at each second of a minute."""
    clock = [100.0]
    monkeypatch.setattr("pairtrace.engine.cost.time.perf_counter", lambda: clock[0])
    path = tmp_path / "a.costs.jsonl"
    lost = []
    with CostMeter(method="m", stage="s", device="cpu", path=path) as meter:
        assert not path.exists()
        for second in range(60):
            clock[0] = 100.0 + second
            meter.add(tokens=1)
            (left,) = read_costs(path)
            lost.append(second + 1 - left.model_tokens)
    assert [second for second, tokens in enumerate(lost) if tokens == 0] == [0, 2, 6, 14, 30, 50]
    assert [cost.model_tokens for cost in read_costs(path)] == [60]


def test_the_table_adds_runs_and_stages(tmp_path: Path) -> None:
    write_costs(tmp_path / "a.costs.jsonl", [record(), record(peak_memory_bytes=3000), record("judge", "score")])
    write_costs(tmp_path / "b.costs.jsonl", [record(stage="warm-up", flops=2.0)])
    prices = Prices(gpu_hour=1.0)
    products = [tmp_path / "a.parquet", tmp_path / "a.costs.jsonl", tmp_path / "b.zarr"]
    lines = {(line.method, line.stage): line for line in cost_table(products, prices).lines}
    assert list(lines) == [
        *(("gradient", "train"), ("gradient", "warm-up"), ("gradient", "total")),
        *(("judge", "score"), ("judge", "total")),
    ]
    train, total = lines["gradient", "train"], lines["gradient", "total"]
    assert (train.runs, train.flops, train.money, train.peak_memory_bytes) == (2, 10.0, 4.0, 3000)
    assert (total.runs, total.flops, total.money, total.wall_seconds) == (3, 12.0, 6.0, 300.0)


def test_the_published_procedure_is_kept_apart(tmp_path: Path) -> None:
    records = [record(extra={"procedure": name}, flops=flops) for name, flops in (("batched", 1.0), ("published", 9.0))]
    write_costs(tmp_path / "a.costs.jsonl", records)
    lines = cost_table([tmp_path / "a.parquet"], Prices()).lines
    assert [(line.method, line.flops) for line in lines if line.stage == "total"] == [
        ("gradient", 1.0),
        ("gradient (published)", 9.0),
    ]


def test_what_has_no_costs_leaves_the_others_standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("m1", "m2.partial"):
        (tmp_path / folder).mkdir()
        write_costs(tmp_path / folder / "pairtrace_train.costs.jsonl", [record("dpo", flops=1.0)])
    (tmp_path / "clean.parquet").touch()
    (tmp_path / "bad.costs.jsonl").write_text("[]")
    table = cost_table(["clean.parquet", "m1", "nothing.zarr", "bad.parquet", "m2/", "clean.parquet"], Prices())
    assert [(line.method, line.stage, line.runs) for line in table.lines] == [("dpo", "train", 2), ("dpo", "total", 2)]
    none, absent, bad = table.problems
    assert none.startswith("clean.parquet has no costs: there is no clean.costs.jsonl beside it")
    assert absent.startswith("there is no nothing.zarr")
    assert "bad.costs.jsonl, line 1 is not a cost record" in bad
    shown = CliRunner().invoke(app, ["cost", "m1", "clean.parquet", "bad.parquet"])
    assert shown.exit_code == 1
    assert "dpo" in shown.stdout and "dpo" not in shown.stderr
    assert [line[:7] for line in shown.stderr.splitlines()] == ["error: ", "error: "]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json\n", "line 1 is not JSON"),
        ("[]\n", "not a cost record"),
        (json.dumps(record().to_dict()) + '\n{"method": "m"}\n', "line 2 is not a cost record"),
        (json.dumps({**record().to_dict(), "flops": "many"}) + "\n", "wrong type in flops"),
        (None, "cannot read the costs file"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "a.costs.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataFormatError, match=message):
        read_costs(path)
