"""What the cosine functions refuse, and which implementation they choose."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairtrace.errors import ConfigError, DirectionError, MissingDependencyError
from pairtrace.kernels import cosine
from pairtrace.kernels.cosine import cosine_blocks, cosine_max, cosine_scores
from pairtrace.kernels.int8 import encode_int8

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("minus", "message"),
    [
        (np.ones((3, 4), np.float32), r"float32 \(2, 4\).*float32 \(3, 4\)"),
        (np.ones((2, 4), np.float16), r"float32 \(2, 4\).*float16 \(2, 4\)"),
        (torch.ones(2, 4), "array float32.*tensor on cpu"),
        (encode_int8(np.ones((2, 4))), "array float32.*scaled int8"),
    ],
)
def test_a_side_unlike_the_rows_is_refused(minus: Any, message: str) -> None:
    for score in (cosine_scores, cosine_max, cosine_blocks):
        with pytest.raises(ConfigError, match=message):
            score(np.ones((2, 4), np.float32), np.ones(4), minus=minus)


@pytest.mark.parametrize("score", [cosine_scores, cosine_max])
@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (np.ones(7), "width 7.*width 8"),
        (np.ones((2, 9)), "width 9.*width 8"),
        (np.zeros(8), "direction 0 .* all its 8 values are 0"),
        (np.stack([np.ones(8), np.zeros(8)]), "direction 1 .* all its 8 values are 0"),
        (np.array([1, 1, np.nan, 1, 1, 1, 1, 1.0]), "direction 0 must be finite, but its value 2 is nan"),
        (np.stack([np.ones(8), np.full(8, -np.inf)]), "direction 1 must be finite, but its value 0 is -inf"),
        (np.ones((0, 8)), "at least one direction"),
        (np.ones((1, 1, 8)), r"shape \[D\] or \[K, D\]"),
    ],
)
@pytest.mark.parametrize("rows", [np.ones((3, 8), np.float32), np.ones((0, 8), np.float32), torch.ones(2, 8)])
def test_unusable_directions_are_refused(score: Any, directions: np.ndarray, message: str, rows: Any) -> None:
    with pytest.raises(DirectionError, match=message):
        score(rows, directions)


@pytest.mark.parametrize(
    ("rows", "keywords", "message"),
    [
        (np.ones((2, 4)), {}, "float64"),
        (np.ones((2, 4), ">f4"), {}, ">f4"),
        (np.ones((2, 4), np.uint16), {}, "row_dtype='bfloat16'"),
        (np.ones((2, 4), np.float16), {"row_dtype": "bfloat16"}, "uint16"),
        (np.ones((2, 4), np.float16), {"row_dtype": "float32"}, "float32"),
        (np.ones(4, np.float32), {}, r"\[N, D\]"),
        ([[1.0, 2.0, 3.0, 4.0]], {}, "list"),
        (torch.ones(2, 4, dtype=torch.float64), {}, "float64"),
        (np.ones((2, 4), np.float32), {"impl": "cuda"}, "'cuda'"),
        (np.ones((2, 4), np.float32), {"impl": "triton"}, "numpy array"),
        (torch.ones(2, 4, device="meta"), {"impl": "numba"}, "host memory"),
    ],
)
def test_unusable_rows_and_choices_are_refused(rows: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cosine_scores(rows, np.ones(4), **keywords)


def test_explicit_triton_raises_and_only_auto_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = torch.ones(2, 4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pairtrace.kernels.cosine_triton", raising=False)
    monkeypatch.delattr("pairtrace.kernels.cosine_triton", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pairtrace\[gpu\]"):
        cosine_scores(rows, np.ones(4), impl="triton")

    monkeypatch.setitem(sys.modules, "pairtrace.kernels.cosine_numba", None)
    monkeypatch.delattr("pairtrace.kernels.cosine_numba", raising=False)
    monkeypatch.setattr(cosine, "_reported", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.allclose(cosine_scores(rows, np.ones(4)), torch.ones(2, 1))
    assert len(caplog.records) == 1
    with pytest.raises(ImportError):
        cosine_scores(rows, np.ones(4), impl="numba")


def test_triton_refuses_cpu_tensors_outside_the_interpreter() -> None:
    script = (
        "import torch\nfrom pairtrace.errors import ConfigError\nfrom pairtrace.kernels.cosine import cosine_scores\n"
        "try:\n    cosine_scores(torch.ones(2, 4), torch.ones(4), impl='triton')\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    assert "needs a CUDA tensor, but the rows are on cpu" in run.stdout


def test_importing_the_module_imports_neither_torch_nor_numba() -> None:
    script = "import sys, pairtrace.kernels.cosine; print(sorted({'torch', 'numba', 'triton'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
