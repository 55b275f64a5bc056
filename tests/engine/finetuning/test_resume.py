"""Interrupted runs go on to the same weights; other runs, probes and half-written checkpoints are told apart."""

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
from pairtrace.engine.finetuning.finetune import finetune
from pairtrace.errors import ConfigError, DirectionError, ModelError, ProbeMismatchError
from tests.engine.finetuning.cases import config_for, largest_difference, log_of, probes_of, run, write_probes
from tests.engine.training.test_resume import StopsAfter
from tests.models import make_model


def settings(probe: Path, **changes: Any) -> dict[str, Any]:
    return {"method": "sft", "probe": str(probe), "probe_weight": 2.0, "epochs": 2, "save_steps": 1, **changes}


@pytest.mark.parametrize("steps", [3, 4])
def test_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    small: Path, given: Path, probe: Path, against: Path, tmp_path: Path, steps: int
) -> None:
    """Interrupted between the epochs, and inside the second one; the half-written next checkpoint is not taken."""
    out = tmp_path / "m1"
    with pytest.raises(KeyboardInterrupt):
        finetune(config_for(small, given, out, **settings(probe)), StopsAfter(steps))
    half = tmp_path / "m1.partial" / f"checkpoint-{steps + 1}"
    shutil.copytree(tmp_path / "m1.partial" / f"checkpoint-{steps}", half)
    (half / "complete.json").unlink()
    summary = run(small, given, out, **settings(probe))
    assert (summary.training["resumed_from"], summary.training["steps"]) == (steps, 6)
    assert largest_difference(out, against) == 0.0
    assert run(small, given, out, **settings(probe)).already_complete


def test_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(
    small: Path, given: Path, probe: Path, tmp_path: Path
) -> None:
    """With a checkpoint between two entries, each of which is a mean over two steps."""
    options = settings(probe, batch_size=2, max_steps=40, save_steps=5)
    run(small, given, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        finetune(config_for(small, given, tmp_path / "m1", **options), StopsAfter(6))
    assert run(small, given, tmp_path / "m1", **options).training["resumed_from"] == 5
    assert log_of(tmp_path / "m1") == log_of(tmp_path / "whole")


@pytest.mark.slow
def test_killed_process(small: Path, given: Path, probe: Path, against: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as the second checkpoint is there; the next run goes on from it or a later one."""
    out = tmp_path / "m1"
    program = (
        "import sys; from pathlib import Path; from tests.engine.finetuning.cases import run;"
        "run(*map(Path, sys.argv[1:4]), method='sft', probe=sys.argv[4], probe_weight=2.0, epochs=2, save_steps=1)"
    )
    arguments = [sys.executable, "-c", program, str(small), str(given), str(out), str(probe)]
    process = subprocess.Popen(arguments, cwd=Path(__file__).parents[3])
    marker = tmp_path / "m1.partial" / "checkpoint-2" / "complete.json"
    while process.poll() is None and not marker.exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    summary = run(small, given, out, **settings(probe))
    assert summary.training["resumed_from"] >= 1 or summary.already_complete
    assert largest_difference(out, against) == 0.0


def test_the_command(small: Path, given: Path, probe: Path, against: Path) -> None:
    """Its options are the settings: the finished run is recognised."""
    arguments = ["finetune", small, given, "--method", "sft", "--probe", probe, "--probe-layers", "1"]
    arguments += ["--probe-weight", "2", "--epochs", "2", "--batch-size", "8", "--learning-rate", "1e-3"]
    arguments += ["--device", "cpu", "--out", against]
    shown = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert shown.exit_code == 1 and "its probe_layers is None, not [1]" in shown.stderr
    arguments[arguments.index("--probe-layers") : arguments.index("--probe-layers") + 2] = []
    shown = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert shown.exit_code == 0, shown.output
    figures = json.loads(shown.stdout)
    assert figures["already_complete"] and figures["trained_against"] == ["harm/1"]
    shown = CliRunner().invoke(app, list(map(str, arguments)))
    assert "watched probes have no part in the training" in shown.stdout


def test_other_runs_are_refused(small: Path, given: Path, probe: Path, against: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its probe_weight is 2\.0, not 3\.0"):
        run(small, given, against, **settings(probe, probe_weight=3.0))
    other = write_probes(tmp_path / "other.safetensors", probes_of(small, seed=5), best_layer=1)
    with pytest.raises(ConfigError, match="its probe_digest is"):
        run(small, given, against, **settings(other))
    out = tmp_path / "m1"
    with pytest.raises(KeyboardInterrupt):
        finetune(config_for(small, given, out, **settings(probe)), StopsAfter(2))
    with pytest.raises(ConfigError, match="holds an unfinished run of another kind: its signal is 'probe', not 'none'"):
        run(small, given, out, method="sft", signal="none", epochs=2)
    shutil.copytree(small, tmp_path / "something")
    with pytest.raises(ConfigError, match="was not made by `pairtrace finetune`"):
        run(small, given, tmp_path / "something", **settings(probe))


def test_probes_that_do_not_belong_to_the_model(small: Path, given: Path, probe: Path, tmp_path: Path) -> None:
    other = shutil.copytree(small, tmp_path / "m0")
    make_model("olmo2", other, num_hidden_layers=2, seed=7)
    with pytest.raises(ProbeMismatchError, match="belongs to another model fingerprint"):
        run(other, given, tmp_path / "m1", **settings(probe))
    with pytest.raises(ProbeMismatchError, match="holds no layer 3"):
        run(small, given, tmp_path / "m1", **settings(probe, probe_layers=(3,)))
    held_out = [one for one in probes_of(small) if one.role == "held-out"]
    alone = write_probes(tmp_path / "alone.safetensors", held_out, best_layer=1)
    with pytest.raises(ProbeMismatchError, match=r"nothing to train against.*harm-held-out-1 \(held-out\)"):
        run(small, given, tmp_path / "m1", **settings(alone))
    with pytest.raises(DirectionError, match="is not a probe file"):
        run(small, given, tmp_path / "m1", **settings(given))
    assert not (tmp_path / "m1.partial").exists()


def test_half_written_model_is_refused(small: Path, given: Path, probe: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(small, tmp_path / "m0")
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    for method in ("sft", "dpo"):
        with pytest.raises(ModelError, match="damaged or half written"):
            run(broken, given, tmp_path / "m1", method=method, signal="none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "name a probe file"),
        ({"signal": "none", "probe_layers": (1,)}, "give --probe"),
        ({"signal": "none", "rules": "r.yaml"}, "belongs to --signal judge"),
        ({"signal": "classifier"}, "--classifier"),
        ({"signal": "none", "beta": 0.2}, "--beta has no part in --method sft"),
        ({"signal": "none", "method": "dpo", "probe_weight": 2.0}, "--probe-weight has no part in --method dpo"),
        ({"signal": "none", "method": "dpo", "samples": 1}, "two responses"),
        ({"signal": "none", "probe_weight": -1.0}, "0 or more"),
        ({"signal": "none", "format": "standard"}, "--format has no part"),
        ({"method": "rl", "signal": "none"}, "sft, dpo"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(small: Path, given: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_for(small, given, tmp_path / "m1", **{"method": "sft", **changes})
