"""Runs the Triton cases where Triton can run them: in its interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

CASES = ("triton_cases", "triton_topk_cases")

pytest.importorskip("triton")


def _run_cases(cases: str, **environment: str) -> None:
    # The kernels decide at import whether they are interpreted: only a process of their own is sure to do so.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{cases}.py"],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("cases", CASES)
def test_kernels_in_the_interpreter(cases: str) -> None:
    _run_cases(cases, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


BUILDS = (
    {"kernel": "stream", "dtype": "float16", "directions": 1},
    {"kernel": "stream", "dtype": "float16", "directions": 1, "capability": 80, "minus": True, "topk": True},
    {"kernel": "stream", "dtype": "bfloat16", "directions": 0},
    {"kernel": "stream", "dtype": "int8", "directions": 1, "norms": True},
    {"kernel": "matrix", "dtype": "float16", "directions": 8},
    {"kernel": "matrix", "dtype": "float16", "directions": 1000, "topk": True},
    {"kernel": "matrix", "dtype": "float32", "directions": 1000, "width": 1023, "capability": 80},
    {"kernel": "pooling", "dtype": "bfloat16", "directions": 0, "capability": 80},
    {"kernel": "pooling", "dtype": "float16", "directions": 0, "minus": True},
)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter does not compile")
@pytest.mark.parametrize("settings", BUILDS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_kernels_compile_for_a_gpu_where_there_is_none(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tests.kernels.triton_builds import SHARED_BYTES, Build, compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    build = Build(**settings)
    kernel = compiled(build)
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_BYTES[build.capability]
    if build.kernel == "pooling":
        return
    assert "cp.async.cg.shared.global" in kernel.asm["ptx"], "rows are not copied 16 bytes at a time ahead of their use"
    if build.kernel == "matrix" and build.capability == 90:
        assert "wgmma" in kernel.asm["ptx"], "no tensor core instruction of its GPU"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cases", CASES)
def test_kernels_on_the_gpu(cases: str) -> None:
    _run_cases(cases)
