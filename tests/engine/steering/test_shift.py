"""The shift at the end of the prompts against single sequences through transformers; refusals; a store's refusal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairtrace.engine.directions import (
    PROMPT_END,
    Direction,
    load_directions,
    read_manifest,
    read_tensors,
    save_directions,
)
from pairtrace.engine.probes.compare import ProbeCompareConfig, compare_probes
from pairtrace.engine.score_directions import select_directions
from pairtrace.engine.steering import shift as module
from pairtrace.engine.steering.shift import ShiftConfig, ShiftSummary, measure_shift
from pairtrace.errors import (
    ConfigError,
    DirectionError,
    LayerError,
    ModelError,
    PairtraceError,
    ProbeMismatchError,
)
from pairtrace.store.reader import ActivationStore
from tests.engine.evaluation.cases import PROMPTS, two_checkpoints, write_rows
from tests.engine.probes.cases import make_sided_store
from tests.engine.steering.cases import LengthJudge, load, prompt_ids
from tests.engine.steering.cases import settings as steering
from tests.models import make_model, make_tokenizer

LAYERS = (0, 1, 2)
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "acts.zarr"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return two_checkpoints(tmp_path_factory.mktemp("models"))


def config(folder: Path, models: tuple[str, str], **changed: Any) -> ShiftConfig:
    given: dict[str, Any] = {
        "prompts": write_rows(folder / "prompts.jsonl", PROMPTS),
        "base": models[0],
        "tuned": models[1],
        "out": str(folder / "shift.safetensors"),
        "layers": LAYERS,
        "device": "cpu",
        # Two batches, rows of several lengths in each.
        "token_budget": 100,
    }
    return ShiftConfig(**{**given, **changed})


def true_states(model: str) -> np.ndarray:
    """float64 [prompts, layers, D] at the last token of each prompt, one prompt at a time, without any padding."""
    plain, tokenizer = load(model)
    before_norm: list[torch.Tensor] = []
    plain.model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    found = []
    for ids in prompt_ids(tokenizer).values():
        with torch.no_grad():
            states = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states
        whole = [*states[:-1], before_norm[-1]]
        found.append(torch.stack([whole[layer][0, -1] for layer in LAYERS]).double().numpy())
    return np.stack(found)


def is_right(found: ShiftSummary, models: tuple[str, str]) -> bool:
    before, after = map(true_states, models)
    moved = after - before
    for position, layer in enumerate(LAYERS):
        (direction,) = load_directions(found.out, layer=layer)
        mean = moved[:, position].mean(axis=0)
        first, second = moved[0::2, position].mean(axis=0), moved[1::2, position].mean(axis=0)
        told = found.layers[position]
        right = [
            np.allclose(direction.values[0], mean, rtol=1e-4, atol=1e-4 * np.linalg.norm(mean)),
            told.length == pytest.approx(np.linalg.norm(mean), rel=1e-4),
            told.share
            == pytest.approx(np.linalg.norm(mean) / np.linalg.norm(before[:, position], axis=1).mean(), rel=1e-4),
            told.agreement
            == pytest.approx(first @ second / np.linalg.norm(first) / np.linalg.norm(second), rel=1e-3, abs=1e-4),
        ]
        if not all(right):
            return False
    return True


def test_equal_to_single_sequences(models: tuple[str, str], tmp_path: Path) -> None:
    found = measure_shift(config(tmp_path, models))
    assert [layer.layer for layer in found.layers] == list(LAYERS)
    assert (found.requests, found.width, found.name) == (len(PROMPTS), 16, "shift")
    assert is_right(found, models)
    states = read_tensors(found.out)
    for position, layer in enumerate(LAYERS):
        np.testing.assert_allclose(states[f"base:{layer}"], true_states(models[0])[:, position].mean(axis=0), atol=1e-4)
    assert read_manifest(found.out)["read_at"] == PROMPT_END
    assert read_manifest(found.out)["requests"] == len(PROMPTS)


@pytest.mark.parametrize("mutation", ["end of the batch", "first token", "layers", "other way round"])
def test_other_readings_are_caught(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    given = models
    if mutation == "end of the batch":
        monkeypatch.setattr(module, "last_tokens", lambda rows: torch.full((len(rows),), -1))
    elif mutation == "first token":
        monkeypatch.setattr(module, "last_tokens", lambda rows: torch.zeros(len(rows), dtype=torch.int64))
    elif mutation == "layers":
        read = module.reading_layers

        def lower(model: Any, layers: Sequence[int]) -> Any:
            class States:
                def __enter__(self) -> Any:
                    self.inner = read(model, [max(0, layer - 1) for layer in layers])
                    states = self.inner.__enter__()
                    return type("Lower", (), {"__getitem__": lambda _, layer: states[max(0, layer - 1)]})()

                def __exit__(self, *error: Any) -> None:
                    self.inner.__exit__(*error)

            return States()

        monkeypatch.setattr(module, "reading_layers", lower)
    else:
        given = (models[1], models[0])
    assert not is_right(measure_shift(config(tmp_path, given)), models)


def test_conditions_of_a_prompt_stay_in_one_half(models: tuple[str, str], tmp_path: Path) -> None:
    rows = [
        {"id": f"p{number}", "prompt": f"How do I pick lock {number}?", "distractor": "Use three words."}
        for number in range(4)
    ]
    both = measure_shift(config(tmp_path, models, prompts=write_rows(tmp_path / "both.jsonl", rows)))
    assert both.requests == 8
    halves = []
    for start in (0, 1):
        # Each half twice: so few prompts would be refused.
        half = [{**row, "id": f"{row['id']}-{again}"} for row in rows[start::2] for again in (0, 1)]
        out = str(tmp_path / f"half-{start}.safetensors")
        path = write_rows(tmp_path / f"half-{start}.jsonl", half)
        measure_shift(config(tmp_path, models, prompts=path, out=out))
        halves.append(load_directions(out, layer=2)[0].values[0].astype(np.float64))
    cosine = halves[0] @ halves[1] / np.linalg.norm(halves[0]) / np.linalg.norm(halves[1])
    assert both.layers[2].agreement == pytest.approx(cosine, abs=1e-4)


def test_all_layers_by_default_and_steered_along(models: tuple[str, str], tmp_path: Path) -> None:
    found = measure_shift(config(tmp_path, models, layers=None, name="lock"))
    assert [layer.layer for layer in found.layers] == [1, 2]
    from pairtrace.engine.steering.steer import steer

    steered = steer(steering(tmp_path, models[0], directions=found.out, layers=(1,)), judge=LengthJudge())
    assert steered.behavior == "lock"
    assert steered.same_model
    assert [arm.direction for arm in steered.arms] == ["", "lock", "random-1"]
    out = str(tmp_path / "without.json")
    without = steer(
        steering(
            tmp_path, models[1], directions=found.out, out=out, layers=(1,), scales=(), ablate=True, ablate_to="base"
        ),
        judge=LengthJudge(),
    )
    assert without.same_model is False
    (direction,) = load_directions(found.out, layer=1)
    unit = direction.values[0] / np.linalg.norm(direction.values[0])
    assert without.arms[1].left == pytest.approx(read_tensors(found.out)["base:1"] @ unit, rel=1e-5)


def test_a_store_is_not_scored_with_it(models: tuple[str, str], tmp_path: Path) -> None:
    store = ActivationStore.open(GOLDEN)
    out = measure_shift(config(tmp_path, models, layers=(1,))).out
    with pytest.raises(DirectionError, match=r"was read at prompt_end.*pairtrace behavior"):
        # Of the same width and model as the store as far as anyone can tell.
        select_directions(_Alike(store, out), [out], 1)


def test_a_ranking_is_not_compared_with_it(models: tuple[str, str], tmp_path: Path) -> None:
    out = measure_shift(config(tmp_path, models, layers=(1,))).out
    with pytest.raises(ProbeMismatchError, match="was given twice"):
        compare_probes(ProbeCompareConfig(first=out, second=out))
    store = make_sided_store(tmp_path / "s")
    wide = tmp_path / "wide.safetensors"
    rows = np.ones((1, ActivationStore.open(store.path).width), np.float32)
    direction = Direction(name="x", layer=2, values=rows, kind="vector", origin="x", read_at=PROMPT_END)
    save_directions(wide, [direction], {})
    with pytest.raises(DirectionError, match="was read at prompt_end"):
        compare_probes(ProbeCompareConfig(first=str(wide), second=str(wide), store=str(store.path)))


class _Alike:
    """A store that the file fits in every other respect."""

    def __init__(self, store: ActivationStore, directions: str) -> None:
        (direction,) = load_directions(directions)
        self.path, self.layers, self.width = store.path, (1,), direction.values.shape[1]
        self.manifest = direction

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"layers": (7,)}, LayerError, "7"),
        ({"layers": (1, 1)}, ConfigError, "distinct"),
        ({"layers": ()}, ConfigError, "distinct"),
        ({"out": "shift.npy"}, ConfigError, r"\.safetensors"),
        ({"name": "a b"}, DirectionError, "'a b'"),
        ({"conditions": ("plain", "loud")}, ConfigError, "loud"),
        ({"token_budget": 0}, ConfigError, "0"),
    ],
)
def test_refusals(
    models: tuple[str, str], tmp_path: Path, changed: dict[str, Any], error: type[PairtraceError], message: str
) -> None:
    with pytest.raises(error, match=message):
        measure_shift(config(tmp_path, models, **changed))
    assert not (tmp_path / "shift.safetensors").exists()


def test_models_that_cannot_be_compared(models: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the same model"):
        measure_shift(config(tmp_path, (models[0], str(tmp_path / "copy")), tuned=_copy(models[0], tmp_path / "copy")))
    wide = make_model("llama", tmp_path / "wide", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    make_tokenizer(wide)
    with pytest.raises(ModelError, match=r"hidden_size 32, but .* 16"):
        measure_shift(config(tmp_path, models, tuned=str(wide)))
    deep = make_model("llama", tmp_path / "deep", hidden_size=16, intermediate_size=32, num_hidden_layers=3)
    make_tokenizer(deep)
    with pytest.raises(ModelError, match=r"num_hidden_layers 3, but .* 2"):
        measure_shift(config(tmp_path, models, tuned=str(deep)))
    other = make_model("llama", tmp_path / "other", hidden_size=16, intermediate_size=32, num_hidden_layers=2, seed=3)
    make_tokenizer(other, vocabulary=500)
    with pytest.raises(ModelError, match="tokenizer_fingerprint"):
        measure_shift(config(tmp_path, models, tuned=str(other)))


def _copy(model: str, to: Path) -> str:
    import shutil

    return str(shutil.copytree(model, to))


def test_too_few_prompts(models: tuple[str, str], tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", PROMPTS[:3])
    with pytest.raises(ConfigError, match="3 prompts to ask; expected at least 4"):
        measure_shift(config(tmp_path, models, prompts=few))
