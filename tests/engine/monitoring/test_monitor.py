"""The monitor over checkpoints: what its log says, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pairtrace.cli import app
from pairtrace.engine.directions import load_directions
from pairtrace.engine.monitoring import checkpoints as checkpoints_module
from pairtrace.engine.monitoring import run as run_module
from pairtrace.engine.monitoring.checkpoints import arriving, checkpoints_of
from pairtrace.engine.monitoring.clusters import WatchedCluster, known_clusters, load_watched, save_watched
from pairtrace.engine.monitoring.config import MonitorConfig
from pairtrace.engine.monitoring.plot import write_plot
from pairtrace.engine.monitoring.run import monitor_run
from pairtrace.engine.monitoring.watch import Alert, Changes, Seen, Watch
from pairtrace.engine.rollout_file import read_rollouts
from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError, LayerError, ModelError
from tests.engine.discovery.discoveries import make_discovery
from tests.engine.monitoring.cases import config_for, read_log, write_checkpoint


@pytest.fixture(scope="module")
def watched(m0: Path, prompts: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a monitor that saw the whole run."""
    out = tmp_path_factory.mktemp("watched")
    summary = monitor_run(config_for(m0, prompts, checkpoints, out, rules="refusal"))
    assert summary.steps == (10, 20, 30) and summary.looked_at == 3 and summary.items == 13
    return out


def test_the_log_tells_what_changed(watched: Path, m0: Path, checkpoints: Path) -> None:
    lines = read_log(watched / "monitor.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert (lines[0]["changed"], lines[0]["unchanged"]) == (0, 13), "the first checkpoint is M0"
    for line in lines:
        assert line["changed"] + line["unchanged"] + sum(line["unreadable"].values()) == 13
        table = read_rollouts(watched / f"step-{line['step']:08d}.rollouts.parquet")
        responses = np.array(table.strings("response")).reshape(2, 13)
        assert line["changed"] == int((responses[0] != responses[1]).sum())
    assert lines[2]["changed"] == 13


def test_what_is_raised_is_told_with_its_severity(
    m0: Path, prompts: Path, checkpoints: Path, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    look = Watch.look

    def raising(self: Watch, step: int, now: Changes) -> Seen:
        severities = {10: ("note",), 20: ("note", "harmful")}[step]
        raised = tuple(Alert(severity=one, cluster="c", text="c has grown") for one in severities)
        return replace(look(self, step, now), raised=raised)

    monkeypatch.setattr(Watch, "look", raising)
    caplog.set_level(logging.INFO)
    monitor_run(config_for(m0, prompts, checkpoints, tmp_path, until_step=20))
    told = [(one.levelname, one.getMessage()) for one in caplog.records if "has grown" in one.getMessage()]
    assert told == [
        ("INFO", "note at step 10: c has grown"),
        ("INFO", "note at step 20: c has grown"),
        ("WARNING", "harmful at step 20: c has grown"),
    ]


def test_a_stopped_monitor_goes_on_as_if_it_had_not(
    watched: Path, m0: Path, prompts: Path, checkpoints: Path, tmp_path: Path
) -> None:
    config = config_for(m0, prompts, checkpoints, tmp_path, rules="refusal", until_step=20)
    assert monitor_run(config).steps == (10, 20)
    with (tmp_path / "monitor.jsonl").open("ab") as file:
        file.write(b'{"step": 30, "chan')  # killed while writing
    config = config_for(m0, prompts, checkpoints, tmp_path, rules="refusal", on_alert="stop", batch_size=3)
    assert monitor_run(config).looked_at == 1
    assert read_log(tmp_path / "monitor.jsonl") == read_log(watched / "monitor.jsonl")
    assert monitor_run(config).looked_at == 0


def test_a_run_that_stopped_at_an_alert_stays_so(
    m0: Path, prompts: Path, checkpoints: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    look = Watch.look

    def raising(self: Watch, step: int, now: Changes) -> Seen:
        return replace(look(self, step, now), raised=(Alert(severity="harmful", cluster="c", text="c has grown"),))

    monkeypatch.setattr(Watch, "look", raising)
    stopping = config_for(m0, prompts, checkpoints, tmp_path, on_alert="stop")
    first = monitor_run(stopping)
    assert first.stopped and first.steps == (10,)
    again = monitor_run(stopping)
    assert again.stopped and again.steps == (10,) and again.looked_at == 0
    follow = monitor_run(replace(stopping, follow=True, poll_seconds=0.01))
    assert follow.stopped and follow.looked_at == 0
    assert monitor_run(config_for(m0, prompts, checkpoints, tmp_path)).steps == (10, 20, 30)


def test_a_model_that_answers_nothing_is_not_clean(
    m0: Path, prompts: Path, checkpoints: Path, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(checkpoints, run)
    broken = run / "checkpoint-20"
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"none of the 13 answers at step 20 can be read \(13 \w+\)"):
        monitor_run(config_for(m0, prompts, run, out))
    assert [line["step"] for line in read_log(out / "monitor.jsonl")] == [10]
    # Inside a training there is no checkpoint to replace: it is told, and the training goes on.
    monkeypatch.setattr(run_module, "checkpoint_fingerprint", lambda path: None)
    monkeypatch.setattr(run_module, "_require_logged", lambda *_: None)
    summary = monitor_run(config_for(m0, prompts, run, out, until_step=20))
    assert sum(summary.unreadable.values()) == 13
    assert "step 20: only 0 of 13 answers can be read" in caplog.text


@pytest.mark.parametrize(
    "entry", [{}, {"step": "30"}, {"step": 30, "clusters": None}, {"step": 30, "clusters": [], "watched": []}]
)
def test_an_entry_that_lacks_something_is_named(
    watched: Path, m0: Path, prompts: Path, checkpoints: Path, tmp_path: Path, entry: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(watched, out)
    with (out / "monitor.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    with pytest.raises(DataFormatError, match=r"monitor\.jsonl is damaged: an entry has (step|clusters|raised) = "):
        monitor_run(config_for(m0, prompts, checkpoints, out, rules="refusal"))


def test_nothing_that_can_be_read_is_an_error(m0: Path, prompts: Path, checkpoints: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoints / "checkpoint-10", run / "checkpoint-10")
    (run / "checkpoint-10" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no checkpoint in .* can be read"):
        monitor_run(config_for(m0, prompts, run, tmp_path / "out"))


def test_a_log_of_other_settings_is_refused(watched: Path, m0: Path, prompts: Path, checkpoints: Path) -> None:
    before = (watched / "monitor.jsonl").read_bytes()
    for changes in ({"alpha": 0.05}, {"rules": None}, {"temperature": 0.5}):
        with pytest.raises(DataMismatchError, match=r"monitor\.jsonl was made with"):
            monitor_run(config_for(m0, prompts, checkpoints, watched, **{"rules": "refusal", **changes}))
    assert (watched / "monitor.jsonl").read_bytes() == before


@pytest.mark.parametrize("follow", [False, True])
def test_a_log_of_another_run_is_refused(
    m0: Path, prompts: Path, checkpoints: Path, tmp_path: Path, follow: bool
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(checkpoints, run)
    monitor_run(config_for(m0, prompts, run, out))
    before = (out / "monitor.jsonl").read_bytes()
    waiting: dict[str, Any] = {"follow": follow, "poll_seconds": 0.01, "until_step": 30}
    assert monitor_run(config_for(m0, prompts, run, out, **waiting)).looked_at == 0
    shutil.rmtree(run / "checkpoint-20")
    assert monitor_run(config_for(m0, prompts, run, out, **waiting)).looked_at == 0, "removed, as training does"
    write_checkpoint(m0, run / "checkpoint-20", 0.02, seed=2)
    with pytest.raises(DataMismatchError, match=r"monitor\.jsonl saw weights .* at step 20, but .*give another --out"):
        monitor_run(config_for(m0, prompts, run, out, **waiting))
    assert (out / "monitor.jsonl").read_bytes() == before


def test_a_log_that_lacks_a_step_is_refused(m0: Path, prompts: Path, checkpoints: Path, tmp_path: Path) -> None:
    config = config_for(m0, prompts, checkpoints, tmp_path)
    monitor_run(config)
    log = tmp_path / "monitor.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(DataMismatchError, match=r"has step 30 but not step 20, and .*checkpoint-20 is there"):
        monitor_run(config)
    entries = [json.loads(line) for line in lines]
    for entry in entries[1:]:
        entry["checkpoint"] = None  # as a training writes it
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(DataMismatchError, match="does not say which weights it saw at step 10"):
        monitor_run(config)


def test_m0_answers_once(m0: Path, prompts: Path, checkpoints: Path, watched: Path, monkeypatch: Any) -> None:
    from pairtrace.engine.monitoring.monitor import Monitor

    monkeypatch.setattr(Monitor, "_load_base", lambda _: pytest.fail("M0 was asked again"))
    monitor_run(config_for(m0, prompts, checkpoints, watched, rules="refusal"))


def test_samples_are_those_of_the_seed_and_the_step(m0: Path, prompts: Path, checkpoints: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        shutil.copytree(checkpoints / "checkpoint-10", run / f"step_{step}")
    monitor_run(config_for(m0, prompts, run, tmp_path / "out", temperature=1.0))
    tables = [read_rollouts(tmp_path / "out" / f"step-{step:08d}.rollouts.parquet") for step in (1, 2)]
    first, second = (np.array(table.strings("response")).reshape(2, 13) for table in tables)
    assert (first[0] == second[0]).all(), "M0's answers stay"
    assert (first[1] != second[1]).any() and (first[1] != first[0]).any()


def test_an_adapter_is_a_checkpoint(m0: Path, prompts: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(m0),
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "run" / "checkpoint-1")
    model.merge_and_unload().save_pretrained(tmp_path / "run" / "checkpoint-2")
    monitor_run(config_for(m0, prompts, tmp_path / "run", tmp_path / "out"))
    first, second = read_log(tmp_path / "out" / "monitor.jsonl")
    assert first["changed"] == second["changed"] > 0
    assert monitor_run(config_for(m0, prompts, tmp_path / "run", tmp_path / "out")).looked_at == 0
    weights = tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(DataMismatchError, match="at step 1, but"):
        monitor_run(config_for(m0, prompts, tmp_path / "run", tmp_path / "out"))
    (tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors").unlink()
    assert [step for step, _ in arriving(config_for(m0, prompts, tmp_path / "run", tmp_path), -1)] == [2]


def test_checkpoints_are_found_by_the_number_in_their_name(tmp_path: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-20", "step_7", "3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    for name in ("checkpoint-5", "final", "checkpoint-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "final" / "config.json").touch()
    assert {step: path.name for step, path in checkpoints_of(tmp_path).items()} == {
        3: "3",
        7: "step_7",
        20: "checkpoint-20",
        100: "checkpoint-100",
    }
    (tmp_path / "epoch-20").mkdir()
    (tmp_path / "epoch-20" / "config.json").touch()
    with pytest.raises(ConfigError, match=r"checkpoint-20 and .*epoch-20 are both of step 20"):
        checkpoints_of(tmp_path)


def test_checkpoints_are_taken_as_they_become_complete(
    m0: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    events: list[str] = []

    def sleep(_: float) -> None:
        """What training does meanwhile."""
        events.append("sleep")
        if len(events) == 1:
            write_checkpoint(m0, run / "checkpoint-1", 0.0)
        elif len(events) == 4:  # half-written: the header says how long it will be
            write_checkpoint(m0, run / "checkpoint-2", 0.0)
            whole = (run / "checkpoint-2" / "model.safetensors").read_bytes()
            (run / "checkpoint-2" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        elif len(events) == 7:
            shutil.copy(run / "checkpoint-1" / "model.safetensors", run / "checkpoint-2" / "model.safetensors")
        elif len(events) == 10:
            shutil.rmtree(run)
        assert len(events) < 20

    monkeypatch.setattr(checkpoints_module.time, "sleep", sleep)
    config = config_for(m0, prompts, run, tmp_path / "out", follow=True)
    found = [(step, len(events)) for step, _ in arriving(config, -1)]
    assert found == [(1, 2), (2, 8)], "a checkpoint is read when it looked the same twice"
    assert [step for step, _ in arriving(config_for(m0, prompts, run, tmp_path, follow=True, patience=1e-9), -1)] == []


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda path: (path / "model.safetensors").unlink()])
def test_a_checkpoint_that_vanishes_is_left_out(
    m0: Path, prompts: Path, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: Any
) -> None:
    run = tmp_path / "run"
    for step in (10, 20):
        shutil.copytree(checkpoints / f"checkpoint-{step}", run / f"checkpoint-{step}")
    load = checkpoints_module._load

    def vanishing(path: Path, dtype: str) -> Any:
        if path.name == "checkpoint-10":
            gone(path)
        return load(path, dtype)

    monkeypatch.setattr(checkpoints_module, "_load", vanishing)
    assert monitor_run(config_for(m0, prompts, run, tmp_path / "out")).steps == (20,)


def test_bad_input_is_named(m0: Path, prompts: Path, checkpoints: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        monitor_run(config_for(m0, prompts, empty, tmp_path / "a"))
    with pytest.raises(ConfigError, match="give the directory above it"):
        monitor_run(config_for(m0, prompts, checkpoints / "checkpoint-10", tmp_path / "b"))
    trained = tmp_path / "trained"
    shutil.copytree(m0, trained)
    (trained / "pairtrace_train.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"training that is over: .*trained\.partial and are gone; .*train --monitor"):
        monitor_run(config_for(m0, prompts, trained, tmp_path / "b"))
    assert not list(tmp_path.glob("[ab]")), "M0 has answered in vain"
    with pytest.raises(LayerError, match="layer 9"):
        monitor_run(config_for(m0, prompts, checkpoints, tmp_path / "c", layer=9))
    run = tmp_path / "run"
    shutil.copytree(checkpoints / "checkpoint-10", run / "checkpoint-10")
    tokenizer = json.loads((run / "checkpoint-10" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (run / "checkpoint-10" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="with --base"):
        monitor_run(config_for(m0, prompts, run, tmp_path / "d"))


@pytest.mark.parametrize(
    "changes",
    [
        *({"alpha": 0.0}, {"alpha": 1.0}, {"min_growth": -0.1}, {"null_samples": 0}, {"temperature": -1.0}),
        *({"null_temperature": 0.0}, {"on_alert": "panic"}, {"min_cluster_size": 1}, {"max_new_tokens": 0}),
        {"min_cluster_size": 0},
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--" + next(iter(changes)).replace("_", "-")):
        MonitorConfig(base="m0", prompts="bag.jsonl", out="out", **changes)


def test_new_clusters_are_directions_that_score_takes(tmp_path: Path) -> None:
    prints = {f"{name}_fingerprint": name for name in ("model", "tokenizer", "template")}
    units = np.eye(4, dtype=np.float32)
    kinds = ("new", "candidate")
    clusters = [
        WatchedCluster(name=f"c-{number}", kind=kind, direction=units[number], threshold=0.3 + number / 10)
        for number, kind in enumerate(kinds)
    ]
    path = tmp_path / "step.safetensors"
    save_watched(path, clusters, layer=2, prints=prints)
    assert [(one.name, one.layer, one.model_fingerprint) for one in load_directions(path)] == [
        ("c-0", 2, "model"),
        ("c-1", 2, "model"),
    ]
    for one, other in zip(clusters, load_watched(path, ["c-0", "c-1"]), strict=True):
        assert (one.name, one.kind, one.threshold) == (other.name, other.kind, other.threshold)
        assert (one.direction == other.direction).all()
    with pytest.raises(DataFormatError, match="c-2"):
        load_watched(path, ["c-2"])
    save_watched(tmp_path / "none.safetensors", [], layer=2, prints=prints)
    assert not (tmp_path / "none.safetensors").exists() and load_watched(tmp_path / "none.safetensors", []) == []


def test_the_clusters_of_a_discovery(tmp_path: Path) -> None:
    from pairtrace.engine.discovery.product import DescribedCluster, Discovered, write_product

    prints = {f"{name}_fingerprint": name for name in ("model", "tokenizer", "template")}
    common: dict[str, Any] = {"size": 2, "persistence": 0.5, "cosine_median": 0.8}
    flagged = DescribedCluster(number=0, direction="cluster-0", cosine_low=0.6, verdicts={"flagged": True}, **common)
    wide = DescribedCluster(number=1, direction="cluster-1", cosine_low=-0.1, **common)
    none = DescribedCluster(number=2, direction=None, cosine_low=None, **common | {"cosine_median": None})
    directions = np.array([[3, 4, 0], [0, 0, 2], [0, 0, 0]], np.float32)
    found = Discovered(
        view="prompts",
        layer=2,
        clusters=(flagged, wide, none),
        items=np.array(list("abcdef"), dtype=object),
        labels=np.repeat(np.arange(3), 2).astype(np.int32),
        probabilities=np.ones(6, np.float32),
        cosines=np.ones(6, np.float32),
        directions=directions,
        inputs=prints,
        settings={},
        details={},
    )
    write_product(tmp_path, found)
    layer, clusters = known_clusters(str(tmp_path), prints, None)
    assert layer == 2
    assert [(one.name, one.flagged, one.threshold) for one in clusters] == [
        ("cluster-0", True, 0.6),
        ("cluster-1", False, 0.2),
    ]
    assert np.allclose(clusters[0].direction, [0.6, 0.8, 0])
    with pytest.raises(DataMismatchError, match="--layer is 1"):
        known_clusters(str(tmp_path), prints, 1)
    with pytest.raises(DataMismatchError, match="model_fingerprint"):
        known_clusters(str(tmp_path), prints | {"model_fingerprint": "another"}, None)
    pairs = tmp_path / "pairs"
    write_product(pairs, make_discovery("pairs"))
    with pytest.raises(DataMismatchError, match="holds a discovery among pairs; expected one among prompts"):
        known_clusters(str(pairs), prints, None)


def test_the_plot_is_a_picture_of_the_log(tmp_path: Path, watched: Path) -> None:
    ElementTree.parse(watched / "monitor.svg")
    share = {"count": 3, "of": 10, "share": 0.3, "interval": [0.1, 0.6]}
    line = {"name": "new-1 <&>", "kind": "new", "flagged": False, "now": share, "start": share}
    raised = {"severity": "harmful", "cluster": "new-1", "text": 'grew "a lot" & more'}
    entries = [
        {"step": step, "items": 10, "changed": 4, "clusters": [line], "raised": [raised] if step == 2 else []}
        for step in (1, 2)
    ]
    write_plot(tmp_path / "p.svg", entries)
    text = ElementTree.tostring(ElementTree.parse(tmp_path / "p.svg").getroot(), encoding="unicode", method="text")
    assert "new-1 <&>" in text and "alert" in text and 'step 2: grew "a lot" & more' in text
    write_plot(tmp_path / "p.svg", [])
    ElementTree.parse(tmp_path / "p.svg")


def test_the_command_says_when_there_is_an_alert(
    m0: Path, prompts: Path, checkpoints: Path, watched: Path, tmp_path: Path
) -> None:
    def run(out: Path) -> Any:
        config = config_for(m0, prompts, checkpoints, out)
        words = ["-q", "monitor", config.run, "--base", config.base, "--prompts", config.prompts, "--out", config.out]
        words += [
            "--cache",
            str(config.cache),
            "--max-new-tokens",
            "6",
            "--null-samples",
            "2",
            "--device",
            "cpu",
            "--rules",
            "refusal",
            "--json",
        ]
        return CliRunner().invoke(app, words)

    calm = run(watched)
    assert calm.exit_code == 0, calm.output
    assert json.loads(calm.stdout)["steps"] == [10, 20, 30]
    shutil.copytree(watched, tmp_path / "out")
    log = tmp_path / "out" / "monitor.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[2]["raised"] = [{"severity": "harmful", "cluster": "c", "text": "c has grown"}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    alarmed = run(tmp_path / "out")
    assert alarmed.exit_code == 3
    assert json.loads(alarmed.stdout)["alerts"] == [
        {"step": 20, "severity": "harmful", "cluster": "c", "text": "c has grown"}
    ]
