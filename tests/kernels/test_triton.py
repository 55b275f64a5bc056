"""Runs the Triton cases where Triton can run them: in its interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton")


def _run_cases(**environment: str) -> None:
    # The kernels decide at import whether they are interpreted: only a process of their own is sure to do so.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/triton_cases.py"],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def test_kernels_in_the_interpreter() -> None:
    _run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter does not compile")
def test_kernels_compile_for_a_gpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pairtrace.kernels import cosine_triton, pooling_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = GPUTarget("cuda", 80, 32)
    integers = dict.fromkeys(("N", "K", "D", "row_stride"), "i32")
    for words, directions in (("*fp16", 1), ("*i16", 64)):
        blocks = dict(zip(("BLOCK_N", "BLOCK_K", "BLOCK_D"), cosine_triton._block_sizes(directions, 4096), strict=True))
        constants = {"column_stride": 1, "HAS_NORMS": directions > 1, **blocks}
        pointers = {"rows_ptr": words, **dict.fromkeys(("units_ptr", "norms_ptr", "out_ptr"), "*fp32")}
        signature = pointers | integers | dict.fromkeys(constants, "constexpr")
        compiled = triton_compile(ASTSource(cosine_triton._cosine_kernel, signature, constants), target=target)
        assert compiled.asm["cubin"]
    constants = {"column_stride": 1, "segment_stride": 1, "BLOCK_T": 32, "BLOCK_D": 128}
    signature = {"hidden_ptr": "*bf16", "segment_ptr": "*i64", "first_ptr": "*i64", "last_ptr": "*i64"}
    signature |= {"mean_ptr": "*fp32", "D": "i32", "token_stride": "i32"} | dict.fromkeys(constants, "constexpr")
    assert triton_compile(ASTSource(pooling_triton._segment_mean_kernel, signature, constants), target=target).asm[
        "cubin"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_gpu() -> None:
    _run_cases()
