"""Training with a monitor: the same weights to the bit, the answers of the checkpoints, and a stop at an alert."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pairtrace import MonitorCallback
from pairtrace.engine.monitoring import config as monitoring_config
from pairtrace.engine.monitoring import watch
from pairtrace.engine.monitoring.config import MonitorConfig
from pairtrace.engine.monitoring.monitor import Monitor
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.rollout_file import read_rollouts
from pairtrace.engine.rollout_table import TUNED
from pairtrace.engine.sampling import Request, Sampler
from pairtrace.errors import ConfigError, DataMismatchError, TrainingError
from tests.engine.monitoring.cases import read_log
from tests.engine.training.cases import config_for, largest_difference, rows, run, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows())


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of six tokens: a random model does not end them."""
    short = partial(MonitorConfig, max_new_tokens=6, null_samples=1)
    monkeypatch.setattr(monitoring_config, "MonitorConfig", short)


@pytest.fixture(scope="module")
def plain(m0: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained without a monitor: three steps."""
    out = tmp_path_factory.mktemp("plain") / "m1"
    run(m0, data, out)
    return out


@pytest.mark.usefixtures("brief")
def test_weights_are_the_same_to_the_bit(m0: Path, data: Path, prompts: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "m1"
    run(m0, data, out, monitor=str(prompts), monitor_steps=2, monitor_rules="refusal")
    assert largest_difference(out, plain) == 0
    log = tmp_path / "m1.monitor"
    assert [line["step"] for line in read_log(log / "monitor.jsonl")] == [2, 3]
    # What was answered in training is what the checkpoint answers: hooks and mode of training took no part.
    table = read_rollouts(log / "step-00000003.rollouts.parquet").table.to_pylist()
    answered = [row for row in table if row["model"] == TUNED]
    encoder = PromptEncoder.load(str(m0))
    requests = [
        Request(name="", prompt=encoder.encode("", json.loads(row["messages"])), seed=row["seed"]) for row in answered
    ]
    sampled = Sampler.load(PromptEncoder.load(str(plain)), device="cpu").sample(
        requests, temperature=0, max_new_tokens=6, batch_size=4
    )
    assert [row["response"] for row in answered] == [one.response for one in sampled]
    assert len(answered) == 13


@pytest.mark.usefixtures("brief")
def test_an_alert_stops_training_and_the_run_goes_on_without(
    m0: Path, data: Path, prompts: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m1"
    look = watch.Watch.look

    def alarmed(self: Any, step: int, now: Any) -> Any:
        seen = look(self, step, now)
        raised = [watch.Alert(severity=watch.HARMFUL, cluster="c", text="c has grown")] if step == 2 else []
        return watch.Seen(lines=seen.lines, raised=tuple(raised), changed=seen.changed, rest=seen.rest)

    monkeypatch.setattr(watch.Watch, "look", alarmed)
    settings: dict[str, Any] = {"monitor": str(prompts), "monitor_steps": 1}
    with pytest.raises(TrainingError, match=r"step 2: c has grown"):
        run(m0, data, out, monitor_stop=True, **settings)
    assert not out.exists()
    assert run(m0, data, out, **settings).resumed_from == 2
    assert [line["step"] for line in read_log(tmp_path / "m1.monitor" / "monitor.jsonl")] == [1, 2, 3]
    assert largest_difference(out, plain) == 0


def test_random_numbers_of_training_are_left_alone(
    m0: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = Monitor.observe

    def drawing(self: Monitor, step: int, sampler: Sampler) -> Any:
        draw()
        return observe(self, step, sampler)

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    def begin() -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3)

    monkeypatch.setattr(Monitor, "observe", drawing)
    config = MonitorConfig(base=str(m0), prompts=str(prompts), out=str(tmp_path), max_new_tokens=2, null_samples=1)
    callback = MonitorCallback(config, steps=1)
    arguments = SimpleNamespace(world_size=1, bf16=False, fp16=False)
    state, control = SimpleNamespace(global_step=0), SimpleNamespace(should_training_stop=False)
    model = AutoModelForCausalLM.from_pretrained(m0).train()
    begin()
    expected = draw()
    begin()
    callback.on_train_begin(arguments, state, control, model=model)
    for step in (1, 2):
        state.global_step = step
        callback.on_step_end(arguments, state, control, model=model)
    callback.on_train_end(arguments, state, control, model=model)
    assert draw() == expected
    assert [line["changed"] for line in read_log(tmp_path / "monitor.jsonl")] == [0, 0], "M0 answers as M0"
    assert not control.should_training_stop
    state.global_step = 0
    with pytest.raises(DataMismatchError, match=r"begins at step 0, but .*monitor\.jsonl has .*steps 1 to 2"):
        callback.on_train_begin(arguments, state, control, model=model)


def test_what_cannot_be_watched_is_refused() -> None:
    config = MonitorConfig(base="m0", prompts="bag.jsonl", out="out")
    with pytest.raises(ConfigError, match="at least 1"):
        MonitorCallback(config, steps=0)

    class Arguments:
        world_size = 2

    with pytest.raises(ConfigError, match="2 processes"):
        MonitorCallback(config, steps=1).on_train_begin(Arguments(), None, None)
    with pytest.raises(ConfigError, match="--monitor PROMPTS"):
        config_for(Path("m0"), Path("d"), Path("o"), monitor_stop=True)
