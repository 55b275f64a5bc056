"""Training end to end, against a plain loop in PyTorch and against TRL left to itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pairtrace.engine.checkpoint import load_config, load_model, load_tokenizer, model_fingerprint
from pairtrace.engine.cost import read_costs
from pairtrace.engine.fingerprints import fingerprints
from pairtrace.engine.training.batches import StepBatches
from pairtrace.errors import ConfigError, DataError, ModelError, TrainingError
from tests.engine.extraction import pair
from tests.engine.training.cases import largest_difference, rendered, rows, run, weights, write_rows

TOLERANCE = 2e-6


def plain_training(model_path: Path, data: Path, *, steps: int, epochs: int = 1, rate: float = 1e-3) -> Any:
    """DPO (arXiv 2305.18290, eq. 7) one sequence at a time with transformers' own forward."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    pairs = rendered(model_path, data)
    lengths = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    order = StepBatches(lengths, batch_size=8, accumulation=1, seed=0, group_by_length=False)

    def log_probability(network: Any, ids: Any, start: int) -> torch.Tensor:
        tokens = torch.tensor(ids.tolist())
        logits = network(input_ids=tokens[None]).logits[0, :-1]
        return logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]][start - 1 :].sum()

    def both(index: int) -> torch.Tensor:
        sides = ((pairs[index].chosen_ids, pairs[index].chosen_start),)
        sides += ((pairs[index].rejected_ids, pairs[index].rejected_start),)
        return torch.stack([log_probability(model, ids, start) for ids, start in sides])

    with torch.no_grad():
        reference = [both(index) for index in range(len(pairs))]
    total = steps * epochs
    warmup = math.ceil(total * 0.1)
    step = 0
    for epoch in range(epochs):
        order.set_epoch(epoch)
        for batch in order:
            losses = []
            for index in batch:
                ratios = both(index) - reference[index]
                losses.append(-functional.logsigmoid(0.1 * (ratios[0] - ratios[1])))
            torch.stack(losses).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            share = step / warmup if step < warmup else (total - step) / (total - warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return model


def test_weights_are_those_of_a_plain_loop(small: Path, data: Path, trained: Path) -> None:
    expected = plain_training(small, data, steps=3, epochs=2).state_dict()
    actual = weights(trained)
    moved = max(float((actual[name] - value).abs().max()) for name, value in weights(small).items())
    assert moved > 100 * TOLERANCE
    for name, value in actual.items():
        assert torch.allclose(value, expected[name], rtol=0, atol=20 * TOLERANCE), name


def test_weights_are_those_of_trl_left_to_itself(small: Path, data: Path, tmp_path: Path) -> None:
    """TRL tokenises the same rows and keeps an explicit reference; a step holds all pairs, so order is no matter."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    settings = {"learning_rate": 1e-3, "max_steps": 2, "lr_scheduler_type": "constant", "seed": 0}
    model, frozen = (AutoModelForCausalLM.from_pretrained(small) for _ in range(2))
    trainer = DPOTrainer(
        model,
        ref_model=frozen,
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=24,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_length=60,
            **settings,
        ),
        train_dataset=datasets.Dataset.from_list(rows()),
        processing_class=load_tokenizer(small),
    )
    trainer.train()
    run(
        small, data, tmp_path / "m1", batch_size=24, max_steps=2, scheduler="constant", warmup=0.0, max_length=60,
        learning_rate=1e-3,
    )  # fmt: skip
    expected = trainer.model.state_dict()
    for name, value in weights(tmp_path / "m1").items():
        assert torch.allclose(value, expected[name].cpu(), rtol=0, atol=20 * TOLERANCE), name


def test_first_loss_and_record(small: Path, data: Path, trained: Path) -> None:
    record = json.loads((trained / "pairtrace_train.json").read_text())
    summary = record["summary"]
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["last_loss"] < 0.69
    assert (summary["rows"], summary["trained"], summary["dropped"], summary["steps"]) == (24, 24, 0, 6)
    assert summary["reference_computed"] + summary["reference_cached"] == 48
    assert summary["settings"]["learning_rate"] == 1e-3
    assert record["identity"]["model_fingerprint"] == model_fingerprint(small)
    assert record["versions"]["trl"]
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in rendered(small, data))
    assert summary["tokens"] == 2 * tokens
    reference, training = read_costs(trained / "pairtrace_train.costs.jsonl")
    assert (reference.stage, training.stage) == ("reference", "train")
    assert (reference.model_tokens, training.model_tokens) == (tokens, 2 * tokens)
    assert training.flops == pytest.approx(3 * 2 * reference.flops)
    assert summary["flops"] == pytest.approx(training.flops + reference.flops)


def test_result_is_an_ordinary_checkpoint_that_differs_in_weights_alone(small: Path, trained: Path) -> None:
    assert not trained.with_name("m1.partial").exists()
    before, after = (json.loads((path / "config.json").read_text()) for path in (small, trained))
    assert before == after
    assert fingerprints(load_tokenizer(small)) == fingerprints(load_tokenizer(trained))
    assert (small / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    load_model(AutoModelForCausalLM, trained, load_config(trained), "auto")
    assert model_fingerprint(small) != model_fingerprint(trained)


def test_weights_of_a_bfloat16_checkpoint_are_trained_in_float32(small: Path, data: Path, tmp_path: Path) -> None:
    """Updates of DPO's size are below the spacing of bfloat16 numbers and would be lost one by one."""
    model = AutoModelForCausalLM.from_pretrained(small).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m0")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "m0" / file).write_bytes((small / file).read_bytes())
    options = {"learning_rate": 1e-5, "scheduler": "constant", "warmup": 0.0}
    run(tmp_path / "m0", data, tmp_path / "exact", save_dtype="float32", **options)
    run(tmp_path / "m0", data, tmp_path / "rounded", **options)
    start = weights(tmp_path / "m0")
    exact, rounded = weights(tmp_path / "exact"), weights(tmp_path / "rounded")
    for name, value in start.items():
        assert rounded[name].dtype == value.dtype == torch.bfloat16
        assert torch.equal(rounded[name], exact[name].to(torch.bfloat16))
    # What was trained lies between the numbers that bfloat16 has.
    between = sum(int((value != value.to(torch.bfloat16).float()).sum()) for value in exact.values())
    assert between > 0.5 * sum(value.numel() for value in exact.values())
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"


def test_rows_that_cannot_be_trained_on_are_counted_and_named(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = rows(12)
    made[3] = pair("word " * 200, "yes", "no")  # TRL would drop it without a word
    made[7] = pair("And?", "", "no")  # TRL would train on it
    data = write_rows(tmp_path / "pairs.jsonl", made)
    summary = run(small, data, tmp_path / "m1", max_length=100)
    assert (summary.trained, summary.dropped) == (10, 2)
    assert summary.reasons == {"prompt_too_long": 1, "empty_response": 1}
    dropped = json.loads((tmp_path / "m1" / "pairtrace_train.json").read_text())["dropped"]
    assert [row["row"] for row in dropped] == [3, 7]
    assert all(row.keys() == {"row", "source", "pair_id", "reason"} for row in dropped)
    assert "max_length is 100" in dropped[0]["reason"]
    assert "2 of 12 rows cannot be trained on" in caplog.text


def test_edited_data_shares_the_reference(small: Path, data: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first = run(small, data, tmp_path / "all", reference_cache=cache)
    made = rows()
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in made[:4]] + made[4:20]
    edited = write_rows(tmp_path / "edited.jsonl", swapped)
    second = run(small, edited, tmp_path / "edited", reference_cache=cache)
    alone = run(small, edited, tmp_path / "alone", reference_cache=str(tmp_path / "empty"))
    assert first.reference_computed > 0 == second.reference_computed
    assert alone.reference_computed > 0
    assert largest_difference(tmp_path / "edited", tmp_path / "alone") < TOLERANCE


def test_spreading_a_step_over_passes_changes_nothing(small: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    run(small, data, tmp_path / "m1", epochs=2, accumulation=4)
    assert largest_difference(tmp_path / "m1", trained) < 10 * TOLERANCE
    run(small, data, tmp_path / "other", epochs=2, data_seed=1)
    assert largest_difference(tmp_path / "other", trained) > 100 * TOLERANCE


def test_adapter_is_merged_into_the_model_and_kept(small: Path, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    summary = run(small, data, tmp_path / "m1", lora=4, epochs=2)
    assert summary.first_loss == pytest.approx(math.log(2), abs=1e-5)
    assert summary.last_loss is not None and summary.last_loss < 0.692
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m1")
    base = AutoModelForCausalLM.from_pretrained(small)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "m1" / "adapter")(input_ids=ids).logits
        logits = merged(input_ids=ids).logits
    assert torch.allclose(logits, adapted, atol=1e-3)
    assert not torch.allclose(logits, before, atol=1e-2)
    untouched = weights(small)["lm_head.weight"]
    assert torch.equal(weights(tmp_path / "m1")["lm_head.weight"], untouched)


def test_adapter_alone(small: Path, data: Path, tmp_path: Path) -> None:
    run(small, data, tmp_path / "m1", lora=2, lora_targets=("q_proj",), merge=False, max_steps=1)
    assert (tmp_path / "m1" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "m1" / "config.json").exists()


@pytest.mark.parametrize("loss", [("ipo",), ("sigmoid", "sft")])
def test_other_losses(small: Path, data: Path, tmp_path: Path, loss: tuple[str, ...]) -> None:
    summary = run(small, data, tmp_path / "m1", loss_type=loss, max_steps=1, group_by_length=True)
    assert summary.first_loss is not None and math.isfinite(summary.first_loss)


def test_exploding_loss_stops_with_step_and_pairs(small: Path, data: Path, tmp_path: Path) -> None:
    options = {"learning_rate": 1e25, "warmup": 0.0, "max_grad_norm": 0.0, "save_steps": 1, "epochs": 3}
    with pytest.raises(TrainingError, match=r"in step \d+; try .* rows (\d+, ){3}\d+ and 4 more$") as caught:
        run(small, data, tmp_path / "m1", **options)
    assert "earlier checkpoints of the run are kept" in str(caught.value)
    assert not (tmp_path / "m1").exists()
    assert (tmp_path / "m1.partial" / "run.json").is_file()
    assert list((tmp_path / ".pairtrace-reference").rglob("*.npy"))


def test_lack_of_memory_is_said_with_advice(
    small: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pairtrace.engine.training.pair_trainer import PairTrainer

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(PairTrainer, "compute_loss", exhausted)
    with pytest.raises(TrainingError, match="--accumulation"):
        run(small, data, tmp_path / "m1")


def test_half_written_checkpoint_is_refused(small: Path, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "m0"
    broken.mkdir()
    for file in small.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    content = (small / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="damaged or half written"):
        run(broken, data, tmp_path / "m1")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        run(broken, data, tmp_path / "m1")
    assert not (tmp_path / "m1").exists()


def test_data_without_a_usable_row(small: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", [pair("Why?", "", "no")])
    with pytest.raises(DataError, match=r"none of the 1 rows can be trained on \(1 [a-z_]+\); row 0"):
        run(small, data, tmp_path / "m1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation": 3}, "divisor"),
        ({"adam_beta2": 1.0}, "from 0 to below 1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"beta": float("nan")}, "--beta is nan"),
        ({"compute_dtype": "float16"}, "float32, bfloat16"),
        ({"lora_alpha": 8.0}, "--lora RANK"),
        ({"loss_type": ("dpo",)}, "unknown loss 'dpo'"),
        ({"loss_weights": (1.0, 2.0)}, "give one each"),
        ({"lora": 2, "lora_targets": ("no_such_module",)}, "no_such_module"),
        ({"lora": 2, "lora_targets": ("lm_head",)}, "lm_head"),
        ({"scheduler": "exponential"}, "linear, cosine, constant"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_cannot_be(small: Path, data: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(small, data, tmp_path / "m1", **changes)


def test_nothing_is_printed_and_no_generator_is_touched(
    small: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run(small, data, tmp_path / "m1", max_steps=1)
    assert torch.equal(torch.rand(3), expected)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
