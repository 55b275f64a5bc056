"""Compiling the Triton kernels for a GPU that need not be there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pairtrace.kernels import cosine_triton, cosine_triton_kernels, pooling_triton

# Shared memory that a program may have, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
POINTERS = {
    "high_ptr": "*fp16",
    "low_ptr": "*fp16",
    "thresholds_ptr": "*i64",
    "counts_ptr": "*i32",
}
WORDS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*i16", "int8": "*i8"}


@dataclass(frozen=True, kw_only=True)
class Build:
    """What a kernel is compiled for; pooling with `minus` is the kernel of differences, `dtype` that of its store."""

    kernel: str
    dtype: str
    directions: int
    capability: int = 90
    width: int = 4096
    topk: bool = False
    minus: bool = False
    norms: bool = False


def compiled(build: Build) -> Any:
    """Triton's compiled kernel, for aligned and contiguous rows."""
    if build.kernel == "pooling":
        return _compile(*_pooling(build), build.capability)
    exact = build.dtype in ("float16", "int8") and not build.minus
    constants: dict[str, Any] = {
        "HAS_NORMS": build.norms,
        "HAS_MINUS": build.minus,
        "SCALED": build.dtype == "int8",
        "TOPK": build.topk,
        "SIGN": 1.0,
        "CAPACITY": 4096 if build.topk else 1,
        "ALIGN": 16,
        "column_stride": 1,
        "minus_column_stride": 1,
    }
    if build.kernel == "stream":
        kernel = cosine_triton_kernels.stream_kernel
        blocks = cosine_triton.stream_blocks(build.width)
        constants["K"] = build.directions
    else:
        kernel = cosine_triton_kernels.matrix_kernel
        shared = SHARED_BYTES[build.capability]
        blocks = cosine_triton.matrix_blocks(build.directions, wide=not exact, shared_bytes=shared)
        constants["FUSED"] = exact and build.directions <= cosine_triton.FUSED_DIRECTIONS
        constants["BLOCK_K"] = blocks.directions
    constants |= {
        "EVEN_D": build.width % blocks.columns == 0,
        "BLOCK_N": blocks.rows,
        "BLOCK_D": blocks.columns,
        "STAGES": blocks.stages,
    }
    pointers = POINTERS | {
        "rows_ptr": WORDS[build.dtype],
        "minus_ptr": WORDS[build.dtype],
        "out_ptr": "*i64" if build.topk else "*fp32",
    }
    return _compile(kernel, constants, pointers, blocks.warps, build.capability)


def _pooling(build: Build) -> tuple[Any, dict[str, Any], dict[str, str], int]:
    constants: dict[str, Any] = {"column_stride": 1, "segment_stride": 1, "BLOCK_T": 32, "BLOCK_D": 128}
    pointers = {"hidden_ptr": "*bf16", "segment_ptr": "*i64"}
    pointers |= {"first_ptr": "*i64", "last_ptr": "*i64"}
    if not build.minus:
        return pooling_triton._segment_mean_kernel, constants, pointers, 4
    constants |= {"HAS_WEIGHT": True, "SIDES": True, "BLOCKS": 32}
    pointers |= {"squares_ptr": "*fp64", "done_ptr": "*i32"}
    pointers |= dict.fromkeys(("diff_ptr", "chosen_ptr", "rejected_ptr"), WORDS[build.dtype])
    return pooling_triton._pooled_difference_kernel, constants, pointers, 4


def _compile(kernel: Any, constants: dict[str, Any], pointers: dict[str, str], warps: int, capability: int) -> Any:
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointers.get(name, "*fp32") if name.endswith("_ptr") else "i32"
        if name not in ("N", "K", "first_row"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    ordered = {name: constants[name] for name in kernel.arg_names if name in constants}
    source = ASTSource(kernel, signature, ordered, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": kernel is not pooling_triton._pooled_difference_kernel}
    return triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)
