from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pairtrace.engine.flops import ModelShape, causal, extraction_flops, published_flops
from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.plan import GPU_FLOPS, PlanConfig, _total, plan
from pairtrace.engine.rendering import Quarantined, Renderer
from pairtrace.errors import ConfigError, LayerError, UnsupportedModelError
from pairtrace.store.layout import array_specs
from tests.models import HH, make_config, make_tokenizer
from tests.store.samples import make_manifest

TYPES = ["gpt_neox", "llama", "olmo2", "phi", "qwen2", "qwen3", "starcoder2", "gemma2"]


def counted_flops(config: Any, length: int, head: bool) -> int:
    """What torch counts for a forward pass over one sequence, with attention over the full square."""
    from transformers import AutoModel, AutoModelForCausalLM

    config._attn_implementation = "eager"
    model = (AutoModelForCausalLM if head else AutoModel).from_config(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.ones(1, length, dtype=torch.int64), use_cache=False)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("head", [False, True])
def test_forward_flops_equal_those_that_torch_counts(model_type: str, head: bool) -> None:
    config = make_config(model_type)
    shape = ModelShape.from_config(config)
    for length in (7, 33):
        counted = counted_flops(config, length, head)
        # The tables of the rotary embedding are a product too: 2 * (head width / 2) per token at the most.
        rotary = shape.head_width * length
        ours = shape.forward_flops(length, length * length, shape.blocks, head=head)
        assert ours <= counted <= ours + rotary, (model_type, ours, counted)


@pytest.mark.parametrize("change", [{"kv_heads": 4}, {"mlp_matrices": 2}, {"heads": 5}, {"mlp_width": 65}])
def test_a_wrong_shape_would_be_noticed(change: dict[str, int]) -> None:
    config = make_config("llama")
    right = ModelShape.from_config(config)
    wrong = ModelShape(**{**vars(right), **change})
    counted = counted_flops(config, 33, head=False)
    assert abs(wrong.forward_flops(33, 33 * 33, 4) - counted) > right.head_width * 33


def test_mixture_of_experts_counts_the_active_ones() -> None:
    shape = ModelShape.from_config(make_config("qwen3_moe"))
    assert (shape.active_experts, shape.routed_experts, shape.mlp_width) == (2, 4, 32)
    attention = 2 * 32 * 8 * (2 * 4 + 2 * 2)
    assert shape.block_flops_per_token == attention + 2 * (2 * 3 * 32 * 32) + 2 * 32 * 4


def test_attended_pairs_equal_a_count_over_masks() -> None:
    shape = ModelShape.from_config(make_config("llama"))
    for prompt, chosen, rejected in ((5, 3, 4), (1, 1, 1), (0, 6, 2), (30, 1, 9)):
        total = prompt + chosen + rejected
        leaf = np.array([0] * prompt + [1] * chosen + [2] * rejected)
        before = np.tril(np.ones((total, total), bool))
        visible = before & ((leaf[None, :] == 0) | (leaf[None, :] == leaf[:, None]))
        expected = 3 * (shape.block_flops_per_token * total + shape.flops_per_attended * int(visible.sum()))
        assert extraction_flops(shape, 3, prompt, chosen, rejected) == expected
        square = [prompt + chosen, prompt + rejected]
        expected = sum(
            4 * (shape.block_flops_per_token * t + shape.flops_per_attended * int(np.tril(np.ones((t, t))).sum()))
            + shape.head_flops_per_token * t
            for t in square
        )
        assert published_flops(shape, prompt, chosen, rejected) == expected
    assert causal(4) == 10


def test_unknown_model_types_are_refused() -> None:
    from transformers import AutoConfig

    with pytest.raises(UnsupportedModelError, match="'gpt2' has no FLOP formula"):
        ModelShape.from_config(AutoConfig.for_model("gpt2"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_tokenizer(path)
    make_config("llama").save_pretrained(path)
    assert not list(path.glob("*.safetensors")), "a plan must not need weights"
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": "word " * int(rng.integers(1, 60)),
            "chosen": " yes" * int(rng.integers(1, 40)),
            "rejected": " no" * int(rng.integers(1, 40)),
        }
        for _ in range(600)
    ]
    rows[3]["chosen"] = " "
    rows[9]["rejected"] = rows[9]["chosen"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(data: str, model: str, **options: Any) -> PlanConfig:
    return PlanConfig(**{"data": data, "model": model, "layers": (3,), **options})


def test_the_exact_plan_equals_a_plain_loop(data: str, model: str) -> None:
    from transformers import AutoTokenizer

    made = plan(config(data, model, sample=None, gpu_flops=1e9, mfu=0.5, price_per_hour=3.0))
    shape = ModelShape.from_config(make_config("llama"))
    tokens = twice = 0
    flops = other = 0.0
    quarantined: dict[str, int] = {}
    renderer = Renderer(AutoTokenizer.from_pretrained(model))
    for pair in open_pairs(data).read():
        result = renderer.render([pair])[0]
        if isinstance(result, Quarantined):
            quarantined[result.code] = quarantined.get(result.code, 0) + 1
            continue
        tokens += len(result.chosen_ids) + len(result.rejected_ids) - result.chosen_start
        twice += len(result.chosen_ids) + len(result.rejected_ids)
        sizes = result.chosen_start, result.chosen_tokens, result.rejected_tokens
        flops += extraction_flops(shape, 3, *sizes)
        other += published_flops(shape, *sizes)
    assert made.quarantined == quarantined == {"empty_response": 1, "identical": 1}
    assert made.pairtrace.tokens.value == pytest.approx(tokens)
    assert made.published.tokens.value == pytest.approx(twice)
    assert made.pairtrace.flops.value == pytest.approx(flops)
    assert made.published.flops.value == pytest.approx(other)
    assert made.pairtrace.flops.low == made.pairtrace.flops.high == made.pairtrace.flops.value
    assert made.flop_ratio == pytest.approx(other / flops)
    assert made.pairtrace.hours == pytest.approx(flops / 0.5e9 / 3600)
    assert made.pairtrace.money == pytest.approx(flops / 0.5e9 / 3600 * 3)
    # Shared response beginnings are computed once, so even a count of every row is not exact.
    assert not any("exact" in line for line in made.assumptions)
    assert any("upper bound" in line and "--reuse" in line for line in made.assumptions)
    assert any("50%" in line and "--utilisation" in line for line in made.assumptions)


def test_a_sample_comes_close_and_its_interval_covers_the_truth(data: str, model: str) -> None:
    exact = plan(config(data, model, sample=None))
    covered = 0
    for seed in range(40):
        sampled = plan(config(data, model, sample=60, seed=seed))
        assert sampled.sampled == 60
        covered += sampled.pairtrace.flops.low <= exact.pairtrace.flops.value <= sampled.pairtrace.flops.high
        assert sampled.pairtrace.flops.value == pytest.approx(exact.pairtrace.flops.value, rel=0.4)
    # 95 % of 40 are 38; fewer than 33 happens once in thousands of honest intervals.
    assert covered >= 33
    assert "60 of 600" in sampled.assumptions[0]


def test_intervals_shrink_to_nothing_as_the_sample_becomes_the_whole() -> None:
    values = np.random.default_rng(0).normal(10, 2, 100)
    widths = [(e := _total(values[:n], 100)).high - e.low for n in (10, 50, 99, 100)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == 0


def test_the_store_size_is_that_of_the_arrays(data: str, model: str, tmp_path: Path) -> None:
    from tests.engine.small_store import make_store

    made = plan(config(data, model, layers=(1, 3), sides=True, dtype="float32", sample=10))
    assert made.store_bytes == 600 * (16 + 12 + 1 + 2 * (3 * 32 * 4 + 4))
    assert (made.width, made.layers) == (32, (1, 3))
    # Against real chunks: 256 rows are four full shards, so only checksums (4 bytes per chunk) come on top.
    store = make_store(tmp_path, rows=256, width=32, layers=(2, 5))
    arrays = ("pair_id", "tokens", "status", "diff/2", "diff/5", "norm/2", "norm/5")
    chunks = [c for name in arrays for c in (Path(store.path) / name / "c").rglob("*") if c.is_file()]
    assert len(chunks) == 4 * len(arrays)
    planned = 256 * (16 + 12 + 1 + 2 * (32 * 2 + 4))
    assert sum(chunk.stat().st_size for chunk in chunks) == planned + 4 * len(chunks)


def test_the_store_size_of_int8_counts_the_scales(data: str, model: str) -> None:
    made = plan(config(data, model, layers=(1, 3), sides=True, dtype="int8", sample=10))
    manifest = make_manifest(rows=600, width=32, layers=(1, 3), sides=True, dtype="int8", shard_rows=64)
    numeric = [spec for spec in array_specs(manifest).values() if not spec.is_text]
    assert made.store_bytes == sum(spec.rows * spec.row_bytes for spec in numeric)


def test_devices_and_prices(data: str, model: str) -> None:
    named = plan(config(data, model, sample=10, gpu="h200"))
    assert named.pairtrace.hours == pytest.approx(named.pairtrace.flops.value / (0.4 * GPU_FLOPS["H200"]) / 3600)
    assert named.pairtrace.money is None
    assert any("H200" in line and "989" in line for line in named.assumptions)
    assert any("40%" in line for line in named.assumptions)
    bare = plan(config(data, model, sample=10, price_per_hour=2.0))
    assert bare.pairtrace.hours is None
    assert bare.pairtrace.money is None
    json.dumps(bare.to_dict())


def test_real_data_without_loading_any_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan must not load weights")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", forbidden)
    made = plan(config(str(HH), model, sample=50))
    assert made.rows == 2312
    assert made.flop_ratio is not None and made.flop_ratio > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, "no layer"),
        ({"dtype": "int4"}, "--dtype is 'int4'"),
        ({"sample": 1}, "at least 2"),
        ({"mfu": 0.0}, "--utilisation is 0"),
        ({"mfu": 1.1}, "--utilisation is 1.1"),
        ({"gpu": "TPU"}, "unknown GPU 'TPU'; known are B200, H200"),
        ({"gpu_flops": -1.0}, "--gpu-flops is -1"),
        ({"gpu_flops": float("inf")}, "--gpu-flops is inf"),
        ({"price_per_hour": float("nan")}, "--price is nan"),
        ({"price_per_hour": float("inf")}, "--price is inf"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("d", "m", **options)


def test_a_layer_outside_the_model_is_refused(data: str, model: str) -> None:
    with pytest.raises(LayerError, match=r"layer 5 is outside .* to 4"):
        plan(config(data, model, layers=(5,)))
