"""Reference log-probabilities against a plain forward pass, and the cache by content."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pairtrace.engine.training.batches import sides
from pairtrace.engine.training.reference import ReferenceCache, reference_log_probabilities, side_id
from pairtrace.errors import TrainingError
from tests.engine.training.cases import rendered, rows, run, write_rows
from tests.models import make_model, make_tokenizer


def passes(cache: ReferenceCache, pairs: list, value: float = -1.5) -> tuple[np.ndarray, list[int]]:
    """The values, and the sequences of each forward pass; every sequence gets its own length times `value`."""
    sizes = []

    def compute(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(batch["input_ids"]))
        return batch["completion_mask"].sum(dim=1) * value

    values, _ = reference_log_probabilities(pairs, cache, compute, pad_token_id=0, token_budget=400)
    return values, sizes


def test_values_are_those_of_a_plain_forward_pass(small: Path, data: Path, tmp_path: Path) -> None:
    """One sequence at a time, through transformers' own forward and log_softmax."""
    run(small, data, tmp_path / "m1", max_steps=1, reference_cache=str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(small)
    (directory,) = (tmp_path / "cache").iterdir()
    (file,) = directory.iterdir()
    records = np.load(file)
    stored = {
        bytes(side): float(value) for side, value in zip(records["side"], records["log_probability"], strict=True)
    }
    checked = [side for pair in rendered(small, data) for side in sides(pair)]
    assert len(stored) == len({side_id(side) for side in checked})
    for ids, start in checked:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0]
        expected = logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:].astype(np.int64))]
        total = float(expected[start - 1 :].sum())
        assert stored[side_id((ids, start))] == pytest.approx(total, rel=1e-5, abs=1e-3)
        # The mutation that matters: one token more or less.
        assert stored[side_id((ids, start))] != pytest.approx(float(expected[start:].sum()), rel=1e-5, abs=1e-3)


def test_edited_data_needs_no_new_pass_and_swapped_pairs_get_swapped_values(
    small: Path, data: Path, tmp_path: Path
) -> None:
    cache = ReferenceCache(tmp_path, "0" * 64, "float32")
    pairs = rendered(small, data)
    values, sizes = passes(cache, pairs)
    assert sum(sizes) == len({side_id(side) for pair in pairs for side in sides(pair)})
    made = rows()
    edited = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in made[:5]] + made[9:]
    kept = list(range(5)) + list(range(9, 24))
    again = ReferenceCache(tmp_path, "0" * 64, "float32")
    found, sizes = passes(again, rendered(small, write_rows(tmp_path / "edited.jsonl", edited)), value=99.0)
    assert not sizes
    assert np.array_equal(found[:5], values[:5, ::-1])
    assert np.array_equal(found, np.where(np.arange(20)[:, None] < 5, values[kept][:, ::-1], values[kept]))


@pytest.mark.parametrize(("fingerprint", "precision"), [("1" * 64, "float32"), ("0" * 64, "bfloat16")])
def test_values_of_other_models_and_precisions_are_kept_apart(
    small: Path, data: Path, tmp_path: Path, fingerprint: str, precision: str
) -> None:
    pairs = rendered(small, data)
    passes(ReferenceCache(tmp_path, "0" * 64, "float32"), pairs)
    _, sizes = passes(ReferenceCache(tmp_path, fingerprint, precision), pairs)
    assert sizes


def test_side_with_another_boundary_is_another_side(small: Path, data: Path) -> None:
    pair = rendered(small, data)[0]
    assert side_id((pair.chosen_ids, pair.chosen_start)) != side_id((pair.chosen_ids, pair.chosen_start + 1))


def test_damaged_file_is_left_out_and_computed_again(
    small: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = rendered(small, data)
    expected, first = passes(ReferenceCache(tmp_path, "0" * 64, "float32"), pairs)
    (file,) = tmp_path.rglob("*.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    values, again = passes(ReferenceCache(tmp_path, "0" * 64, "float32"), pairs)
    assert "damaged" in caplog.text
    assert again == first
    assert np.array_equal(values, expected)


def test_interrupted_pass_keeps_what_it_has(small: Path, data: Path, tmp_path: Path) -> None:
    pairs = rendered(small, data)
    done = 0

    def compute(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal done
        if done > 10:
            raise KeyboardInterrupt
        done += len(batch["input_ids"])
        return batch["completion_mask"].sum(dim=1) * -1.0

    with pytest.raises(KeyboardInterrupt):
        reference_log_probabilities(
            pairs, ReferenceCache(tmp_path, "0" * 64, "float32"), compute, pad_token_id=0, token_budget=400
        )
    _, sizes = passes(ReferenceCache(tmp_path, "0" * 64, "float32"), pairs)
    assert sum(sizes) == len({side_id(side) for pair in pairs for side in sides(pair)}) - done


def test_pass_that_does_not_fit_is_made_smaller(
    small: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = rendered(small, data)
    expected, _ = passes(ReferenceCache(tmp_path / "plenty", "0" * 64, "float32"), pairs, value=-1.0)

    def compute(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch["completion_mask"].sum(dim=1) * -1.0

    cache = ReferenceCache(tmp_path / "scarce", "0" * 64, "float32")
    values, _ = reference_log_probabilities(pairs, cache, compute, pad_token_id=0, token_budget=1000)
    assert np.array_equal(values, expected)
    assert "goes on with" in caplog.text


def test_value_that_is_not_finite_is_refused_with_its_row(small: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"row \d+ is nan"):
        passes(ReferenceCache(tmp_path, "0" * 64, "float32"), rendered(small, data), value=float("nan"))


def test_reference_is_the_checkpoint_on_disk_and_a_wrong_one_is_seen(data: Path, tmp_path: Path) -> None:
    """TRL loads the reference from `_name_or_path`, whatever the weights are: here it would be another model."""
    other = tmp_path / "other"
    make_tokenizer(other)
    make_model("olmo2", other, num_hidden_layers=2, seed=5)
    model = tmp_path / "m0"
    make_tokenizer(model)
    make_model("olmo2", model, num_hidden_layers=2, seed=6)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": str(other)}))
    cache = str(tmp_path / "cache")
    summary = run(model, data, tmp_path / "m1", max_steps=1, reference_cache=cache)
    assert summary.first_loss == pytest.approx(np.log(2), abs=1e-4)
    # Now the values of the cache are wrong, with the right checksum.
    (file,) = Path(cache).rglob("*.npy")
    records = np.load(file)
    records["log_probability"][::3] += 40.0
    store = ReferenceCache(cache, file.parent.name.partition("-")[0], "float32")
    file.unlink()
    for record in records:
        store.add(bytes(record["side"]), float(record["log_probability"]))
    store.flush()
    with pytest.raises(TrainingError, match=r"ln 2 = 0\.6931"):
        run(model, data, tmp_path / "m2", max_steps=1, reference_cache=cache)
