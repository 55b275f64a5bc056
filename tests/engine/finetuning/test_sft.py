"""Fine-tuning on given responses against a probe: what enters the weights, and what does not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.finetuning.example_rendering import RenderedExample, render_examples
from pairtrace.engine.finetuning.examples import open_examples
from pairtrace.engine.finetuning.finetune import finetune
from pairtrace.engine.finetuning.probe_watch import ProbeWatch
from pairtrace.engine.finetuning.response_trainer import ResponseTrainer
from pairtrace.engine.probes.probe_file import load_probes
from pairtrace.engine.probes.term import ProbeTerm
from pairtrace.engine.rendering import Renderer
from pairtrace.engine.training.batches import StepBatches
from pairtrace.errors import ConfigError, DataError, TrainingError
from tests.engine.finetuning.cases import (
    config_for,
    largest_difference,
    log_of,
    probes_of,
    responses,
    run,
    weights,
    write_probes,
    write_rows,
)
from tests.models import make_model, make_tokenizer


def rendered(model: Path, data: Path) -> list[RenderedExample]:
    source = open_examples(str(data))
    found = render_examples(Renderer(load_tokenizer(model), max_length=None), list(source.read()))
    assert all(isinstance(one, RenderedExample) for one in found)
    return found  # type: ignore[return-value]


def plain_loss(
    model: Any,
    examples: list[RenderedExample],
    probe: Path,
    layer: int,
    weight: float,
    not_imitated: Collection[int] = (),
) -> torch.Tensor:
    """The loss of a step by its formula, one sequence at a time, with transformers' own hidden states."""
    (trained,) = load_probes(probe, layers=(layer,), roles=("training",))
    vectors, biases = torch.from_numpy(trained.weight).to(model.dtype), torch.from_numpy(trained.bias).to(model.dtype)
    nats, tokens, probabilities = torch.zeros((), dtype=model.dtype), 0, []
    for example in examples:
        ids = torch.tensor(example.ids.tolist())
        output = model(input_ids=ids[None], output_hidden_states=True)
        if example.row not in not_imitated:
            predicted = output.logits[0, :-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
            nats = nats - predicted[example.start - 1 :].sum()
            tokens += len(ids) - example.start
        mean = output.hidden_states[layer][0, example.start :].mean(dim=0)
        probabilities.append(torch.sigmoid(vectors @ mean + biases).mean())
    return nats / tokens + weight * torch.stack(probabilities).mean()


def plain_training(
    model_path: Path, data: Path, probe: Path, *, weight: float, epochs: int, not_imitated: Collection[int] = ()
) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    examples = rendered(model_path, data)
    order = StepBatches([len(one.ids) for one in examples], batch_size=8, accumulation=1, seed=0, group_by_length=False)
    total, step = 3 * epochs, 0
    warmup = math.ceil(0.1 * total)
    for epoch in range(epochs):
        order.set_epoch(epoch)
        for batch in order:
            plain_loss(model, [examples[index] for index in batch], probe, 1, weight, not_imitated).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            share = step / warmup if step < warmup else (total - step) / (total - warmup)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * share
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return model.state_dict()


def test_weights_are_those_of_a_plain_loop(small: Path, given: Path, probe: Path, against: Path) -> None:
    expected = plain_training(small, given, probe, weight=2.0, epochs=2)
    without = plain_training(small, given, probe, weight=0.0, epochs=2)
    assert max(float((expected[name] - without[name]).abs().max()) for name in expected) > 1e-3
    for name, value in weights(against).items():
        assert torch.allclose(value, expected[name], rtol=0, atol=4e-5), name


def test_what_the_probe_gives_much_is_not_imitated(small: Path, given: Path, probe: Path, tmp_path: Path) -> None:
    """Which responses these are is known from transformers' states of the untrained model."""
    rated = mean_probabilities(small, rendered(small, given), probe)
    threshold = sorted(rated)[15] + 1e-6
    not_imitated = [row for row, value in enumerate(rated) if value >= threshold]
    assert len(not_imitated) == 8
    settings: dict[str, Any] = {"method": "sft", "probe": str(probe), "probe_weight": 2.0, "epochs": 2}
    summary = run(small, given, tmp_path / "m1", imitate_below=threshold, **settings)
    assert (summary.training["trained"], summary.training["imitated"]) == (24, 16)
    expected = plain_training(small, given, probe, weight=2.0, epochs=2, not_imitated=not_imitated)
    for name, value in weights(tmp_path / "m1").items():
        assert torch.allclose(value, expected[name], rtol=0, atol=4e-5), name


def test_imitating_below_1_is_imitating_all(
    small: Path, given: Path, probe: Path, against: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"method": "sft", "probe": str(probe), "probe_weight": 2.0, "epochs": 2}
    run(small, given, tmp_path / "m1", imitate_below=1.0, **settings)
    assert largest_difference(tmp_path / "m1", against) == 0.0


def test_what_cannot_be_told_apart_is_refused(small: Path, given: Path, probe: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "sft", "probe": str(probe)}
    with pytest.raises(DataError, match=r"none of the 24 responses can be imitated.*1e-06 or more"):
        run(small, given, tmp_path / "m1", imitate_below=1e-6, **settings)
    texts = write_rows(tmp_path / "texts.jsonl", [{"prompt": "Once upon", "completion": " a time"}])
    with pytest.raises(DataError, match="the prompt of row 0 is plain text"):
        run(small, texts, tmp_path / "m1", imitate_below=0.5, **settings)
    assert not (tmp_path / "m1").exists()
    with pytest.raises(ConfigError, match="--imitate-below belongs to --signal probe, but the signal is none"):
        config_for(small, given, tmp_path / "m1", method="sft", signal="none", imitate_below=0.5)
    with pytest.raises(ConfigError, match=r"imitate.below is 0.*a probability above 0"):
        config_for(small, given, tmp_path / "m1", imitate_below=0.0, **settings)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_gradient_of_the_whole_loss_is_that_of_finite_differences(given: Path, tmp_path: Path, layer: int) -> None:
    """The trainer's gradient against differences of the formula in float64, where the probe's part is largest.

    TRL's own part of the loss is float32 whatever the model is, and so are RMS norms: too coarse for differences.
    """
    make_tokenizer(tmp_path)
    path = make_model("gpt_neox", tmp_path, num_hidden_layers=3)
    probe = write_probes(tmp_path / "probe.safetensors", probes_of(path, layers=(layer,)))
    examples = rendered(path, given)[:4]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    trainer = trainer_of(model, examples, probe, 3.0, tmp_path)
    gradients = []
    for weight in (3.0, 0.0):
        trainer._weight, trainer._step_examples = weight, 4
        batch = trainer._collate([{"index": index} for index in range(4)])
        tokens = (batch["labels"][:, 1:] != -100).sum()
        model.zero_grad()
        trainer.compute_loss(model, batch, num_items_in_batch=tokens).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    blocks = [f"gpt_neox.layers.{block}.mlp.dense_4h_to_h.weight" for block in range(3)]
    names = ["gpt_neox.embed_in.weight", *blocks[:layer]]
    for name in names:
        ours, without = (one[name].view(-1) for one in gradients)
        place = int((ours - without).abs().argmax())
        flat = dict(model.named_parameters())[name].data.view(-1)
        values = []
        for sign in (1, -1):
            flat[place] += sign * 1e-5
            with torch.no_grad():
                values.append(float(plain_loss(model, examples, probe, layer, 3.0)))
            flat[place] -= sign * 1e-5
        numeric = (values[0] - values[1]) / 2e-5
        assert abs(float(ours[place] - without[place])) > 1e-2, name
        assert float(ours[place]) == pytest.approx(numeric, rel=2e-5, abs=1e-6), name
    # What comes after the probe is not moved by it.
    for name in blocks[layer:]:
        assert torch.equal(*(one[name] for one in gradients)), name


def test_looking_leaves_the_model_as_it_is(small: Path, given: Path, probe: Path) -> None:
    """Also where the forward pass fails inside; what was read is dropped."""
    model = AutoModelForCausalLM.from_pretrained(small)
    ids = torch.tensor(rendered(small, given)[0].ids.tolist())[None]
    before = model(input_ids=ids).logits
    watch = ProbeWatch(load_probes(probe))
    with watch.reading(model, torch.ones_like(ids)) as states:
        inside = model(input_ids=ids).logits
    figures = watch.averages()
    assert set(figures) == {f"probe/{name}/{layer}" for name in ("harm", "harm-held-out-1") for layer in (1, 2)}
    with pytest.raises(KeyError, match="inside"), watch.reading(model, torch.ones_like(ids)):
        model(input_ids=ids)
        raise KeyError("inside")
    assert watch.averages() == {} and not states
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(before, inside) and torch.equal(before, model(input_ids=ids).logits)


def trainer_of(model: Any, examples: list[RenderedExample], probe: Path, weight: float, out: Path) -> ResponseTrainer:
    from trl import SFTConfig

    arguments = SFTConfig(
        output_dir=str(out), use_cpu=True, bf16=False, report_to="none", remove_unused_columns=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trained = load_probes(probe, roles=("training",))
    return ResponseTrainer(
        model,
        arguments,
        examples=examples,
        imitated=np.ones(len(examples), bool),
        batches=StepBatches([4] * len(examples), batch_size=4, accumulation=1, seed=0, group_by_length=False),
        term=ProbeTerm(trained),
        weight=weight,
        watch=ProbeWatch(trained),
        on_pass=lambda _: None,
        on_save=lambda _: None,
        processing_class=load_tokenizer(probe.parent),
    )


def test_weight_0_is_plain_fine_tuning_to_the_bit(
    small: Path, given: Path, probe: Path, plain: Path, against: Path, tmp_path: Path
) -> None:
    summary = run(small, given, tmp_path / "m1", method="sft", probe=str(probe), probe_weight=0.0, epochs=2)
    assert largest_difference(tmp_path / "m1", plain) == 0.0
    assert largest_difference(against, plain) > 1e-4
    assert summary.trained_against == [] and summary.watched == ["harm/1", "harm-held-out-1/1"]


def test_held_out_probes_are_logged_and_never_in_the_loss(
    small: Path, given: Path, against: Path, tmp_path: Path
) -> None:
    """Other held-out probes, or none: the same weights to the bit. Another training probe: other weights."""
    figures = {}
    for name, held_out in (("none", []), ("other", probes_of(small, held_out=2, seed=9))):
        own = [one for one in probes_of(small) if one.role == "training"]
        file = write_probes(tmp_path / f"{name}.safetensors", own + [one for one in held_out if one.role == "held-out"])
        summary = run(
            small, given, tmp_path / name, method="sft", probe=str(file), probe_layers=(1,), probe_weight=2.0, epochs=2
        )
        assert largest_difference(tmp_path / name, against) == 0.0
        figures[name] = {one for one in log_of(tmp_path / name)[-1] if one.startswith("probe/")}
        assert summary.trained_against == ["harm/1"]
    assert figures["none"] == {"probe/harm/1", "probe/term"}
    assert "probe/harm-held-out-2/1" in figures["other"]
    file = write_probes(tmp_path / "changed.safetensors", probes_of(small, seed=9))
    run(
        small, given, tmp_path / "changed", method="sft", probe=str(file), probe_layers=(1,), probe_weight=2.0, epochs=2
    )
    assert largest_difference(tmp_path / "changed", against) > 1e-4


def mean_probabilities(model_path: Path, examples: list[RenderedExample], probe: Path) -> list[float]:
    """The probe's, of every response, from transformers' hidden states."""
    (trained,) = load_probes(probe, layers=(1,), roles=("training",))
    model = AutoModelForCausalLM.from_pretrained(model_path)
    return [
        float(trained.probabilities(
            model(input_ids=torch.tensor(one.ids.tolist())[None], output_hidden_states=True)
            .hidden_states[1][0, one.start :].mean(dim=0)[None].detach().numpy()
        ).mean())
        for one in examples
    ]  # fmt: skip


def test_the_penalty_lowers_the_probability(plain: Path, against: Path, probe: Path, small: Path, given: Path) -> None:
    examples = rendered(small, given)
    means = {path: np.mean(mean_probabilities(path, examples, probe)) for path in (small, plain, against)}
    assert means[against] < means[plain] - 0.01
    entry = log_of(against)[0]
    assert entry["probe/term"] == pytest.approx(entry["probe/harm/1"], rel=1e-6)
    assert entry["loss"] > 2 * entry["probe/term"]


@pytest.mark.parametrize("changes", [{"accumulation": 4}, {"gradient_checkpointing": True}], ids=str)
def test_how_a_step_is_carried_out_does_not_change_it(
    small: Path, given: Path, probe: Path, against: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Passes of a step hold different numbers of tokens; the term counts every response once."""
    run(small, given, tmp_path / "m1", method="sft", probe=str(probe), probe_weight=2.0, epochs=2, **changes)
    assert largest_difference(tmp_path / "m1", against) < 4e-5


class Losses:
    """Progress that keeps what is shown of the steps."""

    def __init__(self) -> None:
        self.shown: list[float] = []

    def start(self, stage: str, total: int | None, unit: str) -> None:
        pass

    def finish(self) -> None:
        pass

    def advance(self, done: int, **figures: float) -> None:
        self.shown += [figures["loss"]] if "loss" in figures else []


def test_shown_loss_is_that_of_a_step(small: Path, given: Path, probe: Path, tmp_path: Path) -> None:
    seen = Losses()
    config = config_for(small, given, tmp_path / "m1", method="sft", probe=str(probe), accumulation=4, max_steps=2)
    finetune(config, seen)
    assert seen.shown == pytest.approx([entry["loss"] for entry in log_of(tmp_path / "m1")], rel=0.3)


def test_weights_are_those_of_trl_left_to_itself(small: Path, given: Path, tmp_path: Path) -> None:
    """TRL tokenises the same rows; a step holds all of them, so order is no matter."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(small)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=24, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, max_length=40,
            learning_rate=1e-3, max_steps=2, lr_scheduler_type="constant", seed=0,
        ),
        train_dataset=datasets.Dataset.from_list(responses()),
        processing_class=load_tokenizer(small),
    )  # fmt: skip
    trainer.train()
    run(
        small, given, tmp_path / "m1", method="sft", signal="none", batch_size=24, max_steps=2, scheduler="constant",
        warmup=0.0, max_length=40,
    )  # fmt: skip
    expected = trainer.model.state_dict()
    moved = max(float((expected[name] - value).abs().max()) for name, value in weights(small).items())
    assert moved > 1e-3
    for name, value in weights(tmp_path / "m1").items():
        assert torch.allclose(value, expected[name].cpu(), rtol=0, atol=4e-5), name


def test_adapter(small: Path, given: Path, probe: Path, tmp_path: Path) -> None:
    settings = {"method": "sft", "probe": str(probe), "lora": 2, "max_steps": 2, "learning_rate": 1e-2}
    run(small, given, tmp_path / "m1", probe_weight=2.0, **settings)
    run(small, given, tmp_path / "plain", probe_weight=0.0, **settings)
    assert (tmp_path / "m1" / "adapter" / "adapter_model.safetensors").is_file()
    assert largest_difference(tmp_path / "m1", tmp_path / "plain") > 1e-5
    assert largest_difference(tmp_path / "m1", small) > 1e-5


def test_loss_that_is_not_finite_is_refused(small: Path, given: Path, probe: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(small, tmp_path / "m0")
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    model.save_pretrained(broken)
    with pytest.raises(TrainingError, match=r"the loss is nan in step 1.*rows"):
        run(broken, given, tmp_path / "m1", method="sft", signal="none")
    assert not (tmp_path / "m1").exists()


def test_record(against: Path, probe: Path) -> None:
    record = json.loads((against / "pairtrace_finetune.json").read_text())
    assert record["identity"]["probe_weight"] == 2.0
    assert record["identity"]["probes"] == ["harm/1"]
    assert str(probe) not in json.dumps(record["identity"])
    assert record["summary"]["training"]["trained"] == 24
    assert record["summary"]["probabilities"]["harm-held-out-1/1"][0] > 0


def test_rows_that_cannot_be_used_are_named(small: Path, tmp_path: Path) -> None:
    rows = [*responses(9), {"prompt": [{"role": "user", "content": "Why?"}], "completion": []}, {"prompt": None}]
    rows.append({**responses(1)[0], "prompt": [{"role": "user", "content": "Why? " * 60}]})
    data = write_rows(tmp_path / "rows.jsonl", rows)
    summary = run(small, data, tmp_path / "m1", method="sft", signal="none", max_steps=1, max_length=60)
    assert (summary.training["trained"], summary.training["dropped"]) == (9, 3)
    dropped = json.loads((tmp_path / "m1" / "pairtrace_finetune.json").read_text())["dropped"]
    assert [row["row"] for row in dropped] == [9, 10, 11]
    assert summary.training["reasons"] == {"malformed_row": 2, "no_loss_tokens": 1}


def test_judge_leaves_out_what_shows_the_behaviour(small: Path, given: Path, tmp_path: Path) -> None:
    """By the refusal rules complying is the behaviour; every third response refuses."""
    run(small, given, tmp_path / "m1", method="sft", signal="judge", max_steps=3)
    record = json.loads((tmp_path / "m1" / "pairtrace_finetune.json").read_text())
    assert [row["row"] for row in record["dropped"]] == [row for row in range(24) if row % 3]
    assert {row["reason"].partition(":")[0] for row in record["dropped"]} == {"shows_behavior"}
    kept = write_rows(tmp_path / "kept.jsonl", responses()[::3])
    run(small, kept, tmp_path / "plain", method="sft", signal="none", max_steps=3)
    assert largest_difference(tmp_path / "m1", tmp_path / "plain") == 0.0


def test_nothing_left_to_train_on(small: Path, given: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("name: all\npresent: ['.']\n")
    with pytest.raises(DataError, match=r"none of the 24 rows can be trained on \(24 shows_behavior\)"):
        run(small, given, tmp_path / "m1", method="sft", signal="judge", rules=str(rules))
