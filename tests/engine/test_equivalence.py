"""The packed, truncated forward pass against the model's own, one sequence at a time, with hidden states.

The gate is a relative maximum error: a cosine would miss a span that is off by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairtrace.engine import backend as backend_module
from pairtrace.engine import packing
from pairtrace.engine.architectures import FAMILIES
from pairtrace.engine.backend import HFBackend
from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.packing import packed_tokens
from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.rendering import RenderedPair, Renderer
from pairtrace.engine.tree_attention import tree_attention
from pairtrace.errors import LayerError, ModelError, UnsupportedModelError
from pairtrace.kernels import segment_attention as attention_module
from tests.models import FAMILY_SETTINGS, HH, SHAREGPT, make_model, make_tokenizer

GATE = 1e-5
LAYERS = (0, 2, 4)  # embedding output, the middle, and the last block before the final norm

pytestmark = pytest.mark.skipif(not (HH.is_file() and SHAREGPT.is_file()), reason="needs ../shared/data")


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer"))), max_length=220)


@pytest.fixture(scope="module")
def pairs(renderer: Renderer) -> list[RenderedPair]:
    """Real rows of both shared files, long and short, some cut at the limit."""
    rendered = [
        *renderer.render(list(open_pairs(HH).read(0, 24))),
        *renderer.render(list(open_pairs(SHAREGPT).read(0, 16))),
    ]
    good = [result for result in rendered if isinstance(result, RenderedPair)]
    assert len(good) >= 16
    return good


def plain_forward(path: Path, pairs: list[RenderedPair], layers: tuple[int, ...]) -> np.ndarray:
    """Mean response activations [N, 2, L, D] from the whole model: one sequence, its own attention, all states."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    norm_input: list[torch.Tensor] = []
    base = model.base_model
    norm = next(getattr(base, name) for name in ("norm", "final_layer_norm", "final_layernorm") if hasattr(base, name))
    norm.register_forward_pre_hook(lambda module, args: norm_input.append(args[0].detach()))
    means = np.zeros((len(pairs), 2, len(layers), model.config.hidden_size), dtype=np.float64)
    for number, pair in enumerate(pairs):
        for side, (ids, start) in enumerate(
            ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start))
        ):
            norm_input.clear()
            with torch.no_grad():
                output = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True)
            # The last entry of hidden_states is after the final norm, so the norm's input stands in for it.
            states = [*output.hidden_states[:-1], norm_input[0]]
            for depth, layer in enumerate(layers):
                means[number, side, depth] = states[layer][0, start:].double().mean(0).numpy()
    return means


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest absolute deviation over the largest absolute value, worst layer: [N, 2, L, D] each."""
    deviation = np.abs(found - wanted).max(axis=(0, 1, 3))
    return float((deviation / np.abs(wanted).max(axis=(0, 1, 3))).max())


def packed_forward(
    path: Path, pairs: list[RenderedPair], layers: tuple[int, ...] = LAYERS, budget: int = 700, max_length: int = 220
) -> np.ndarray:
    loaded = HFBackend.load(path, layers, device="cpu", dtype="float32", token_budget=budget, max_length=max_length)
    pooled = loaded.pool(pairs)
    assert pooled.failed == ()
    return np.stack([pooled.chosen, pooled.rejected], axis=1)


def test_every_supported_family_is_tested() -> None:
    assert set(FAMILY_SETTINGS) == set(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_equals_the_plain_forward(model_type: str, tmp_path: Path, pairs: list[RenderedPair]) -> None:
    path = make_model(model_type, tmp_path / "model")
    wanted = plain_forward(path, pairs, LAYERS)
    found = packed_forward(path, pairs)
    assert relative_error(found, wanted) <= GATE
    # The differences are what is stored: the gate holds for them as well, on their own scale.
    assert relative_error(found[:, :1] - found[:, 1:], wanted[:, :1] - wanted[:, 1:]) <= GATE


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [40, 400])
def test_equals_the_plain_forward_after_truncation(
    truncation: str, max_length: int, tmp_path: Path, renderer: Renderer
) -> None:
    path = make_model("llama", tmp_path / "model")
    cutting = Renderer(renderer.tokenizer, max_length=max_length, truncation=truncation)
    results = cutting.render(list(open_pairs(HH).read(0, 60)))
    pairs = [result for result in results if isinstance(result, RenderedPair)]
    assert len(pairs) >= 6
    assert relative_error(packed_forward(path, pairs), plain_forward(path, pairs, LAYERS)) <= GATE


def synthetic(
    chosen: list[int], rejected: list[int], chosen_start: int, rejected_start: int | None = None
) -> RenderedPair:
    return RenderedPair(
        row=0,
        source="",
        chosen_ids=np.array(chosen, dtype=np.int32),
        rejected_ids=np.array(rejected, dtype=np.int32),
        chosen_start=chosen_start,
        rejected_start=chosen_start if rejected_start is None else rejected_start,
        pair_id=bytes(16),
    )


def test_bfloat16_stays_close_to_the_plain_bfloat16_forward(tmp_path: Path, pairs: list[RenderedPair]) -> None:
    path = make_model("olmo2", tmp_path / "model", dtype=torch.bfloat16)
    loaded = HFBackend.load(path, LAYERS, device="cpu", token_budget=700, max_length=220)
    assert loaded.compute_dtype == "bfloat16"
    pooled = loaded.pool(pairs)
    found = np.stack([pooled.chosen, pooled.rejected], axis=1)
    wanted = plain_forward(path, pairs, LAYERS)  # the same weights, computed in float32
    assert 1e-6 < relative_error(found, wanted) <= 3e-2


def test_odd_shapes(tmp_path: Path) -> None:
    """Responses that share a beginning, one a prefix of the other, no shared prompt, unequal starts, one token."""
    path = make_model("olmo2", tmp_path / "model")
    run = list(range(5, 45))
    pairs = [
        synthetic(run, [*run[:30], 7, 8], 10),
        synthetic(run, run[:20], 10),
        synthetic(run[:20], run, 19),
        synthetic([9, *run], [8, *run], 1),
        synthetic(run[5:], run, 3, 8),
        synthetic(run[:11], [*run[:10], 3], 10),
        synthetic([4, 5], [4, 6], 1),
    ]
    wanted = plain_forward(path, pairs, LAYERS)
    for budget in (1, 60, 10_000):
        assert relative_error(packed_forward(path, pairs, budget=budget), wanted) <= GATE


def test_pack_budget_and_row_order_change_nothing(tmp_path: Path, pairs: list[RenderedPair]) -> None:
    path = make_model("olmo2", tmp_path / "model")
    wanted = packed_forward(path, pairs, budget=700)
    for budget in (1, 300, 5000):
        assert relative_error(packed_forward(path, pairs, budget=budget), wanted) <= 1e-6
    order = np.random.default_rng(0).permutation(len(pairs))
    shuffled = packed_forward(path, [pairs[place] for place in order], budget=700)
    assert relative_error(shuffled, wanted[order]) <= 1e-6


def test_sharing_saves_the_prompt(pairs: list[RenderedPair]) -> None:
    pair = pairs[0]
    both = len(pair.chosen_ids) + len(pair.rejected_ids)
    assert packed_tokens(pair) <= both - min(pair.chosen_start, pair.rejected_start)


# --- mutations that the gate is known to catch ------------------------------------------------------------------


def shifted_span(monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    original = packing._segment_numbers

    def shift(pair: RenderedPair, segment: Any, base: int) -> np.ndarray:
        numbers = np.roll(original(pair, segment, base), -1)
        numbers[-1] = base + packing.REJECTED
        return numbers

    monkeypatch.setattr(packing, "_segment_numbers", shift)
    return LAYERS


def wrong_layer(monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    return (0, 1, 3)


def whole_sequence(monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    original = backend_module.build_pack

    def everything(pairs: Sequence[RenderedPair], *rest: Any) -> packing.Pack:
        return original([replace(pair, chosen_start=1, rejected_start=1) for pair in pairs], *rest)

    monkeypatch.setattr(backend_module, "build_pack", everything)
    return LAYERS


def rejected_sees_chosen(monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    def leak(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Any, *rest: Any) -> torch.Tensor:
        output = torch.empty_like(query)
        for segment in plan.segments:
            rows = slice(segment.start, segment.stop)
            output[:, :, rows] = attention_module._causal(query[:, :, rows], key[:, :, rows], value[:, :, rows], *rest)
        return output

    monkeypatch.setattr(attention_module, "_segments", leak)
    return LAYERS


@pytest.mark.parametrize("mutate", [shifted_span, wrong_layer, whole_sequence, rejected_sees_chosen])
def test_mutations_are_caught(
    mutate: Callable[[pytest.MonkeyPatch], tuple[int, ...]],
    tmp_path: Path,
    pairs: list[RenderedPair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = make_model("olmo2", tmp_path / "model")
    wanted = plain_forward(path, pairs, LAYERS)
    assert relative_error(packed_forward(path, pairs), wanted) <= GATE
    layers = mutate(monkeypatch)
    assert relative_error(packed_forward(path, pairs, layers), wanted) > 10 * GATE


# --- refusals ---------------------------------------------------------------------------------------------------


def test_layer_outside_the_model(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "model")
    with pytest.raises(LayerError, match=r"layer 5 .* 0 .* 4"):
        HFBackend.load(path, [5], device="cpu")
    with pytest.raises(LayerError, match="layer -1"):
        HFBackend.load(path, [-1], device="cpu")


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("bloom", hidden_size=16, n_layer=1, n_head=2, vocab_size=50)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'bloom'.*olmo2"):
        HFBackend.load(tmp_path, [1], device="cpu")


def test_rotary_scaling_that_depends_on_the_batch_is_refused(tmp_path: Path) -> None:
    path = make_model(
        "llama", tmp_path / "model", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )
    with pytest.raises(UnsupportedModelError, match=r"dynamic.*--max-length 4096"):
        HFBackend.load(path, [1], device="cpu", max_length=None)
    HFBackend.load(path, [1], device="cpu", max_length=4096)


def test_token_outside_the_embedding(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "model")
    loaded = HFBackend.load(path, [1], device="cpu")
    with pytest.raises(ModelError, match=r"token 600.* embeds 600"):
        loaded.pool([synthetic([5, 6, 600], [5, 6, 7], 2)])


def test_attention_features_that_would_be_ignored_are_refused() -> None:
    plan = attention_module.SegmentPlan([attention_module.TreeSegment(0, 1, 1, 1)])
    tensor = torch.zeros(1, 1, 3, 4)
    with pytest.raises(UnsupportedModelError, match="s_aux"):
        tree_attention(torch.nn.Identity(), tensor, tensor, tensor, None, pair_plan=plan, s_aux=tensor)
    with pytest.raises(UnsupportedModelError, match="plan"):
        tree_attention(torch.nn.Identity(), tensor, tensor, tensor, None)
