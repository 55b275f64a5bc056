"""Interrupted runs go on to the same weights, and other runs are not mixed up with them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pairtrace.cli import app
from pairtrace.engine.cost import read_costs
from pairtrace.engine.training.run_directory import RunDirectory
from pairtrace.engine.training.train import train
from pairtrace.errors import ConfigError, ModelError, StoreLockedError
from tests.engine.training.cases import config_for, largest_difference, run

OPTIONS: dict[str, Any] = {"epochs": 2, "save_steps": 1}


class StopsAfter:
    """Progress that interrupts the training after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.training = False
        self.stages: list[str] = []
        self.done = 0

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.stages.append(stage)
        self.training = stage == "train"

    def advance(self, done: int, **figures: float) -> None:
        self.done += done if self.training else 0
        if self.done > self.steps:
            raise KeyboardInterrupt

    def finish(self) -> None:
        self.training = False


def interrupt(small: Path, data: Path, out: Path, steps: int, **changes: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config_for(small, data, out, **{**OPTIONS, **changes}), StopsAfter(steps))


@pytest.mark.parametrize("steps", [3, 4])
def test_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    small: Path, data: Path, trained: Path, tmp_path: Path, steps: int
) -> None:
    """Interrupted between the epochs, and inside the second one."""
    out = tmp_path / "m1"
    interrupt(small, data, out, steps)
    assert not out.exists()
    assert [path.name for path in (tmp_path / "m1.partial").glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    summary = run(small, data, out, **OPTIONS)
    assert (summary.resumed_from, summary.steps) == (steps, 6)
    assert summary.first_loss == pytest.approx(0.693147, abs=1e-5)
    assert largest_difference(out, trained) == 0.0
    records = read_costs(out / "pairtrace_train.costs.jsonl")
    first, second = [record for record in records if record.stage == "train"]
    assert (second.model_tokens, summary.all_processes["records"]) == (summary.tokens, len(records))
    assert summary.all_processes["flops"] == sum(record.flops for record in records) >= summary.flops + first.flops


def test_resumed_adapter_with_accumulation(small: Path, data: Path, tmp_path: Path) -> None:
    run(small, data, tmp_path / "whole", lora=2, accumulation=2, **OPTIONS)
    interrupt(small, data, tmp_path / "m1", 4, lora=2, accumulation=2)
    run(small, data, tmp_path / "m1", lora=2, accumulation=2, **OPTIONS)
    assert largest_difference(tmp_path / "m1", tmp_path / "whole") == 0.0


@pytest.mark.parametrize("damage", ["missing", "no marker", "truncated"])
def test_half_written_checkpoint_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    directory = RunDirectory(tmp_path / "m1")
    directory.begin({}).release()
    for step in (2, 3):
        path = directory.partial / f"checkpoint-{step}"
        path.mkdir()
        (path / "optimizer.pt").write_bytes(b"momentum" * step)
        if step == 2 or damage != "no marker":
            directory.seal_checkpoint(step)
        if step == 2:
            shutil.copytree(path, tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", directory.partial / "checkpoint-2", dirs_exist_ok=True)
    if damage == "missing":
        (directory.partial / "checkpoint-3" / "optimizer.pt").unlink()
    elif damage == "truncated":
        (directory.partial / "checkpoint-3" / "optimizer.pt").write_bytes(b"moment")
    assert directory.last_checkpoint() == directory.partial / "checkpoint-2"
    assert "checkpoint-3 was not written to its end" in caplog.text
    assert not (directory.partial / "checkpoint-3").exists()


def test_sealed_checkpoint_takes_the_place_of_earlier_ones(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "m1")
    directory.begin({}).release()
    for step in (9, 10):
        (directory.partial / f"checkpoint-{step}").mkdir()
        directory.seal_checkpoint(step)
    assert [path.name for path in directory.partial.glob("checkpoint-*")] == ["checkpoint-10"]
    assert directory.last_checkpoint() == directory.partial / "checkpoint-10"


@pytest.mark.slow
def test_killed_process(small: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as the second checkpoint is there; the next run goes on from it or a later one."""
    out = tmp_path / "m1"
    program = (
        "import sys; from pathlib import Path; from tests.engine.training.cases import run;"
        "run(*map(Path, sys.argv[1:]), epochs=2, save_steps=1)"
    )
    arguments = [sys.executable, "-c", program, str(small), str(data), str(out)]
    process = subprocess.Popen(arguments, cwd=Path(__file__).parents[3])
    marker = tmp_path / "m1.partial" / "checkpoint-2" / "complete.json"
    while process.poll() is None and not marker.exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    summary = run(small, data, out, **OPTIONS)
    assert summary.resumed_from >= 1 or summary.already_complete
    assert largest_difference(out, trained) == 0.0


def test_finished_run_is_not_repeated_and_not_overwritten(small: Path, data: Path, trained: Path) -> None:
    before = (trained / "model.safetensors").stat().st_mtime_ns
    summary = run(small, data, trained, epochs=2, save_steps=3, threads=2)
    assert summary.already_complete and summary.steps == 6
    assert (trained / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"its beta is 0\.1, not 0\.3"):
        run(small, data, trained, epochs=2, beta=0.3)


def test_directory_of_something_else_is_not_overwritten(small: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "m1").mkdir()
    (tmp_path / "m1" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="was not made by"):
        run(small, data, tmp_path / "m1")


def test_unfinished_run_with_other_settings_or_data_is_refused(small: Path, data: Path, tmp_path: Path) -> None:
    interrupt(small, data, tmp_path / "m1", 2)
    with pytest.raises(ConfigError, match=r"learning_rate is 0\.001, not 0\.01.*remove"):
        run(small, data, tmp_path / "m1", **{**OPTIONS, "learning_rate": 1e-2})
    other = tmp_path / "other.jsonl"
    other.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="data_fingerprint"):
        run(small, other, tmp_path / "m1", **OPTIONS)
    (tmp_path / "m1.partial" / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json is damaged"):
        run(small, data, tmp_path / "m1", **OPTIONS)


@pytest.mark.parametrize("left", [0, 1])
def test_run_that_left_no_checkpoint_gives_way_to_another(small: Path, data: Path, tmp_path: Path, left: int) -> None:
    """It failed in its second step, or its only checkpoint is half written; what it cost still counts."""
    out = tmp_path / "m1"
    interrupt(small, data, out, 1, save_steps=left)
    markers = list(out.with_name("m1.partial").glob("checkpoint-*/complete.json"))
    assert len(markers) == left
    for marker in markers:
        marker.unlink()
    summary = run(small, data, out, max_steps=1, learning_rate=1e-2)
    assert (summary.resumed_from, summary.settings["learning_rate"]) == (0, 1e-2)
    stages = [record.stage for record in read_costs(out / "pairtrace_train.costs.jsonl")]
    assert stages == ["reference", "train", "reference", "train"]


@pytest.mark.slow
def test_terminated_process_leaves_its_costs(small: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m1"
    command = [sys.executable, "-m", "pairtrace.cli", "train", str(small), str(data), "--out", str(out)]
    process = subprocess.Popen([*command, "--epochs", "5000", "--batch-size", "4", "--device", "cpu"])
    costs = tmp_path / "m1.partial" / "pairtrace_train.costs.jsonl"
    while process.poll() is None and "train" not in [r.stage for r in (read_costs(costs) if costs.exists() else ())]:
        time.sleep(0.05)
    time.sleep(3.0)
    before = read_costs(costs)[-1]
    process.terminate()
    assert process.wait() == 143
    assert read_costs(costs)[-1].model_tokens > before.model_tokens


def test_damaged_weights_are_named_before_the_pairs_are_read(small: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "m0")
    weights = tmp_path / "m0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    seen = StopsAfter(0)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or half written"):
        train(config_for(tmp_path / "m0", data, tmp_path / "m1"), seen)
    assert not seen.stages and not (tmp_path / "m1.partial").exists()


def test_two_processes_do_not_train_into_one_directory(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "m1")
    lock = directory.begin({"seed": 0})
    with pytest.raises(StoreLockedError):
        RunDirectory(tmp_path / "m1").begin({"seed": 0})
    lock.release()
    RunDirectory(tmp_path / "m1").begin({"seed": 0}).release()
    assert json.loads((tmp_path / "m1.partial" / "run.json").read_text()) == {"seed": 0}


def test_the_command_says_what_its_figures_are(small: Path, data: Path, trained: Path) -> None:
    arguments = ["train", str(small), str(data), "--out", str(trained), "--epochs", "2", "--batch-size", "8"]
    shown = CliRunner().invoke(app, [*arguments, "--learning-rate", "1e-3", "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "last_loss and last_accuracy are means over the last tenth of the log" in shown.output
    assert "all_processes adds those of interrupted ones" in shown.output
