"""The commands of probes and steering: options reach the engine, tables are complete, JSON stands alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pairtrace.cli import app
from pairtrace.engine.probes.probe_file import load_probes
from tests.engine.evaluation.cases import two_checkpoints
from tests.engine.probes.cases import make_sided_store
from tests.engine.steering.cases import make_checkpoint, settings


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["--quiet", *(str(argument) for argument in arguments)])
    assert result.exit_code == 0, result.output
    return result


def figures(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return found


def test_train_eval_compare(tmp_path: Path) -> None:
    store = make_sided_store(tmp_path / "s")
    out = tmp_path / "harm.safetensors"
    options = ["--store", store.path, "--layers", "2,5", "--strengths", "0.01,1", "--members", 2, "--hold-out", 1]
    found = figures("probe", "train", *options, "--vary", "seeds", "--folds", 3, "--test-share", 0.3, "--out", out)
    assert found["layers"] == [2, 5] and len(found["probes"]) == 6
    assert found["held_out_examples"] > 0.25 * found["examples"]
    assert found["cross_validation"]["2"]["folds"] == 3
    assert list(found["cross_validation"]["2"]["losses"]) == ["0.01", "1.0"]
    assert {probe.members for probe in load_probes(out, roles=("training",))} == {2}
    shown = run("probe", "train", *options, "--out", tmp_path / "other.safetensors").stdout
    assert "left out: 2 quarantined" in shown and "best layer by cross-validation" in shown
    assert shown.count("held-out-1") == 2 and "ROC-AUC" in shown

    evaluated = figures("probe", "eval", out, "--store", store.path, "--roles", "training,baseline", "--layers", 5)
    assert [(one["name"], one["layer"]) for one in evaluated["probes"]] == [("harm", 5), ("harm-mean-difference", 5)]
    assert evaluated["examples"] == found["held_out_examples"]
    shown = run("probe", "eval", out, "--store", store.path, "--out", tmp_path / "report.json").stdout
    assert "of prompts that the probes were trained on are left out" in shown and " all " in shown
    assert "calibration error" in shown and " C " not in shown
    assert json.loads((tmp_path / "report.json").read_text())["probe"] == str(out)

    other = tmp_path / "other.safetensors"
    compared = figures("probe", "compare", out, other, "--store", store.path, "--layers", 5, "--top-share", 0.1)
    assert len(compared["pairs"]) == 9 and compared["pairs"][0]["top"] == 30
    assert "spearman" in run("probe", "compare", out, other).stdout
    assert run("probe", "compare", out, out, "--layers", 2).stdout.count("harm") > 3


def test_steer(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    config = settings(tmp_path, model)
    command = ["steer", config.prompts, model, "--directions", config.directions, "--layers", 2, "--device", "cpu"]
    command += ["--max-new-tokens", 4, "--controls", 0]
    names = [arm["name"] for arm in figures(*command, "--scales=-0.5", "--out", config.out)["arms"]]
    assert names == ["unsteered", "harm, layer 2, -0.5"]
    shown = run(*command, "--ablate", "--out", tmp_path / "ablated.json").stdout
    assert "harm, layer 2, ablated" in shown and "mean norms: not needed" in shown and "+0.25" not in shown
    shown = run(*command, "--ablate", "--ablate-layers", "all", "--out", tmp_path / "everywhere.json").stdout
    assert "harm, layer 2, ablated at all layers" in shown
    names = [arm["name"] for arm in figures(*command, "--out", tmp_path / "default.json")["arms"]]
    assert names == ["unsteered", *(f"harm, layer 2, {scale}" for scale in ("+0.25", "+0.5", "+1"))]


def test_shift(tmp_path: Path) -> None:
    base, tuned = two_checkpoints(tmp_path)
    command = ["shift", settings(tmp_path, base).prompts, "--base", base, "--tuned", tuned, "--device", "cpu"]
    found = figures(*command, "--layers", "0,2", "--name", "moved", "--out", tmp_path / "some.safetensors")
    assert [layer["layer"] for layer in found["layers"]] == [0, 2]
    shown = run(*command, "--conditions", "plain,distractor", "--out", tmp_path / "all.safetensors").stdout
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0][:3] == ["all:", "6", "requests,"] and ["layer", "length", "share", "agreement"] in lines
    assert [line[0] for line in lines if line[0].isdecimal()] == ["1", "2"]
    steered = ["steer", settings(tmp_path, base).prompts, tuned, "--directions", tmp_path / "some.safetensors"]
    steered += ["--layers", 2, "--ablate", "--ablate-to", "base", "--positions", "prompt_end", "--max-new-tokens", 4]
    assert "moved, layer 2, ablated to the base's" in run(*steered, "--out", tmp_path / "without.json").stdout


@pytest.mark.parametrize("strengths", ["a", "0.1,"])
def test_strengths_that_are_no_numbers(tmp_path: Path, strengths: str) -> None:
    arguments = ["probe", "train", "--store", "s", "--strengths", strengths, "--out", str(tmp_path / "p.safetensors")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "--strengths is" in result.output
