"""Extraction on a real vLLM against the transformers back end, on real rows and on shapes that share blocks.

The gate is a relative maximum error: a cosine would miss a span that is off by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairtrace.engine.backend import HFBackend
from pairtrace.engine.rendering import RenderedPair
from pairtrace.engine.vllm.backend import VLLMBackend
from pairtrace.engine.vllm.families import VLLM_FAMILIES
from tests.engine.test_equivalence import relative_error
from tests.models import HH, SHAREGPT
from tests.vllm.engines import CACHE_GIB, MAX_LENGTH, needs_vllm, odd_pairs, real_pairs, start, vllm_model

GATE = 1e-5
LAYERS = (0, 2, 4)  # embedding output, the middle, and the last block before the final norm

pytestmark = [needs_vllm, pytest.mark.skipif(not (HH.is_file() and SHAREGPT.is_file()), reason="needs ../shared/data")]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAIRTRACE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def pairs(llama: Path) -> list[RenderedPair]:
    return [*real_pairs(llama), *odd_pairs()]


@pytest.fixture
def where(request: pytest.FixtureRequest) -> None:
    """A test with a parameter `kind` runs olmo2 in processes of its own; see the conftest."""
    if request.node.callspec.params["kind"] == "olmo2":
        request.getfixturevalue("engines_in_processes")


def with_vllm(backend: VLLMBackend, pairs: list[RenderedPair]) -> np.ndarray:
    reduced = backend.reduce(pairs, dtype="float32", sides=True)
    assert reduced.problems == {} and reduced.chosen is not None and reduced.rejected is not None
    assert np.array_equal(reduced.diff, reduced.chosen - reduced.rejected)
    norm = np.linalg.norm(reduced.diff.astype(np.float64), axis=2)
    assert np.allclose(reduced.norm, norm, rtol=1e-6)
    return np.stack([reduced.chosen, reduced.rejected], axis=1)


def with_transformers(model: Path, pairs: list[RenderedPair], layers: tuple[int, ...], dtype: str) -> np.ndarray:
    pooled = HFBackend.load(model, layers, device="cpu", dtype=dtype, max_length=MAX_LENGTH).pool(pairs)
    return np.stack([pooled.chosen, pooled.rejected], axis=1)


def require_equal(found: np.ndarray, wanted: np.ndarray) -> None:
    """The gate for both sides, and for the differences on their own scale."""
    assert relative_error(found, wanted) <= GATE
    assert relative_error(found[:, :1] - found[:, 1:], wanted[:, :1] - wanted[:, 1:]) <= GATE


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("kind", sorted(VLLM_FAMILIES))
def test_equals_transformers(
    kind: str, tmp_path: Path, pairs: list[RenderedPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prefix caching and prompts in pieces, which are vLLM's defaults; layer 0 and the last one included."""
    from pairtrace.engine.vllm import connector

    model = vllm_model(kind, tmp_path / "model")
    wanted = with_transformers(model, pairs, LAYERS, "float32")
    computed: list[int] = []
    with start(model, LAYERS) as backend:
        reduced = backend.reduce(pairs, dtype="float32", sides=True, on_pack=lambda _, tokens: computed.append(tokens))
        assert reduced.chosen is not None and reduced.rejected is not None
        found = np.stack([reduced.chosen, reduced.rejected], axis=1)
        # The engine is as good the second time, with everything in its cache.
        again = with_vllm(backend, pairs)
        monkeypatch.setattr(connector, "span_arguments", _shifted(connector.span_arguments))
        shifted = with_vllm(backend, pairs[:16])
        assert backend.bytes_out < 16 * 3 * 5 * len(pairs) * len(LAYERS) * backend.width
    require_equal(found, wanted)
    require_equal(again, wanted)
    # What the gate must notice: a span that begins one token early, a layer taken for its neighbour.
    assert relative_error(shifted, wanted[:16]) > GATE
    assert relative_error(found[:, :, [0, 2, 1]], wanted) > GATE
    assert len(computed) == len(pairs)
    assert sum(computed) < 0.8 * sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)


def _shifted(original: Any) -> Any:
    return lambda pair, side, begin: original(pair, side, begin - 1)


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize(
    ("kind", "layers", "engine"),
    [
        ("llama", (1, 3), {"enable_prefix_caching": False}),
        ("llama", (0,), {"enable_chunked_prefill": False}),
        ("olmo2", (0,), {}),
    ],
    ids=["no prefix caching", "whole prompts", "only what is looked up"],
)
def test_equals_transformers_whatever_the_schedule(
    kind: str, layers: tuple[int, ...], engine: dict[str, Any], tmp_path: Path, pairs: list[RenderedPair]
) -> None:
    """And from a checkpoint that is cut at the deepest layer, with layer 0 alone as well."""
    model = vllm_model(kind, tmp_path / "model")
    wanted = with_transformers(model, pairs, layers, "float32")
    with start(model, layers, engine=engine) as backend:
        require_equal(with_vllm(backend, pairs), wanted)


@pytest.mark.usefixtures("engines_in_processes")
def test_two_copies_of_the_model_share_the_pairs(llama: Path, pairs: list[RenderedPair]) -> None:
    wanted = with_transformers(llama, pairs, (2,), "float32")
    with start(llama, (2,), options={"data_parallel": 2, "cache_gib": CACHE_GIB}) as backend:
        require_equal(with_vllm(backend, pairs), wanted)


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen3"])
def test_bfloat16_stays_close(kind: str, tmp_path: Path, pairs: list[RenderedPair]) -> None:
    """With weights as training starts from; those of the other tests amplify any rounding."""
    model = vllm_model(kind, tmp_path / "model", dtype=torch.bfloat16, scale=0.06)
    wanted, exact = (with_transformers(model, pairs, LAYERS, dtype) for dtype in ("bfloat16", "float32"))
    with start(model, LAYERS) as backend:
        found = with_vllm(backend, pairs)
    cosines, norms = compared(found, wanted)
    assert cosines.min() >= 0.9999
    assert np.abs(norms - 1).max() <= 0.01
    # Beside the fixed gate: no further from the exact values than transformers' own rounding takes them.
    assert (1 - compared(found, exact)[0]).mean() <= 1.5 * (1 - compared(wanted, exact)[0]).mean()


def compared(found: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of [N, 2, L, D] with [N, 2, L, D], and ratios of their norms, each [N, 2, L]."""
    one, other = (values.astype(np.float64) for values in (found, wanted))
    norms = [np.linalg.norm(values, axis=-1) for values in (one, other)]
    return (one * other).sum(axis=-1) / (norms[0] * norms[1]), norms[0] / norms[1]
