"""The GPU kernel behind `pairtrace.kernels.pooling`: imported only when it runs, because Triton is optional.

Letters: T tokens of a pack, D width, S segments, P pairs, B blocks of columns.

One launch for all segments. A program sums BLOCK_D columns of one segment over the tokens from its first to its last,
in float32 and in token order: a contiguous segment's bits do not depend on its place in the pack. For a pair it sums
the pair's three segments, subtracts, rounds and stores; the program that ends last adds up the pair's squares, always
in the order of the columns.

The kernel runs on CPU tensors when TRITON_INTERPRET=1 was set before this module was imported.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pairtrace.errors import ConfigError

BLOCK_T = 32
BLOCK_D = 128


@triton.jit
def _mean(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [T, D] float32, float16 or bfloat16
    segment_ptr,  # [T] int64
    first_ptr,  # [S] int64, first token of each segment
    last_ptr,  # [S] int64, last token; before the first where a segment is empty
    segment,
    d,
    D,
    token_stride,
    column_stride,
    segment_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Columns `d` of a segment's mean, float32 [BLOCK_D]; NaN (0 / 0) where the segment has no tokens."""
    first = tl.load(first_ptr + segment)
    last = tl.load(last_ptr + segment)
    total = tl.zeros([BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_T], tl.int32)
    for start in range(first, last + 1, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t <= last
        own = inside & (tl.load(segment_ptr + t * segment_stride, mask=inside, other=-1) == segment)
        values = tl.load(
            hidden_ptr + t[:, None] * token_stride + d[None, :] * column_stride,
            mask=own[:, None] & (d < D)[None, :],
            other=0.0,
        )
        total += tl.sum(values.to(tl.float32), axis=0)
        count += own.to(tl.int32)
    return total / tl.sum(count, axis=0).to(tl.float32)


@triton.jit
def _segment_mean_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,
    segment_ptr,
    first_ptr,
    last_ptr,
    mean_ptr,  # [S, D] float32, contiguous
    D,
    token_stride,
    column_stride,
    segment_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mean = _mean(
        hidden_ptr,
        segment_ptr,
        first_ptr,
        last_ptr,
        segment,
        d,
        D,
        token_stride,
        column_stride,
        segment_stride,
        BLOCK_T,
        BLOCK_D,
    )
    tl.store(mean_ptr + segment * D + d, mean, mask=d < D)


@triton.jit
def _store_rounded(ptr, values, mask):  # type: ignore[no-untyped-def]
    """Store float32 values in the pointer's dtype, to nearest even; int16 takes the bits of bfloat16."""
    if ptr.dtype.element_ty == tl.int16:
        bits = values.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(ptr, tl.where(values == values, rounded, 0x7FC0).to(tl.int16), mask=mask)  # noqa: PLR0124
    else:
        tl.store(ptr, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pooled_difference_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,
    segment_ptr,
    first_ptr,
    last_ptr,
    weight_ptr,  # [P, 2] float32, shares of (chosen, rejected), read only with HAS_WEIGHT
    diff_ptr,  # [P, D] float32, float16 or int16 (bfloat16 bits), contiguous
    chosen_ptr,  # the same, written only with SIDES
    rejected_ptr,  # the same, written only with SIDES
    squares_ptr,  # [P, B] float64
    done_ptr,  # [P] int32, zeros
    norm_ptr,  # [P] float32
    D,
    token_stride,
    column_stride,
    segment_stride,
    HAS_WEIGHT: tl.constexpr,
    SIDES: tl.constexpr,
    BLOCKS: tl.constexpr,  # B rounded up to a power of two
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = d < D
    chosen = _mean(
        hidden_ptr,
        segment_ptr,
        first_ptr,
        last_ptr,
        3 * pair + 1,
        d,
        D,
        token_stride,
        column_stride,
        segment_stride,
        BLOCK_T,
        BLOCK_D,
    )
    rejected = _mean(
        hidden_ptr,
        segment_ptr,
        first_ptr,
        last_ptr,
        3 * pair + 2,
        d,
        D,
        token_stride,
        column_stride,
        segment_stride,
        BLOCK_T,
        BLOCK_D,
    )
    if HAS_WEIGHT:
        shared = _mean(
            hidden_ptr,
            segment_ptr,
            first_ptr,
            last_ptr,
            3 * pair,
            d,
            D,
            token_stride,
            column_stride,
            segment_stride,
            BLOCK_T,
            BLOCK_D,
        )
        share = tl.load(weight_ptr + 2 * pair)
        chosen = tl.where(share > 0, chosen + share * (shared - chosen), chosen)
        share = tl.load(weight_ptr + 2 * pair + 1)
        rejected = tl.where(share > 0, rejected + share * (shared - rejected), rejected)
    difference = chosen - rejected
    place = pair * D + d
    _store_rounded(diff_ptr + place, difference, columns)
    if SIDES:
        _store_rounded(chosen_ptr + place, chosen, columns)
        _store_rounded(rejected_ptr + place, rejected, columns)
    # float64: no difference that float32 holds can leave its range.
    wide = tl.where(columns, difference, 0.0).to(tl.float64)
    tl.store(squares_ptr + pair * blocks + block, tl.sum(wide * wide, axis=0))
    tl.debug_barrier()  # the square must be out before the count says so
    if tl.atomic_add(done_ptr + pair, 1, sem="acq_rel") == blocks - 1:
        b = tl.arange(0, BLOCKS)
        parts = tl.load(squares_ptr + pair * blocks + b, mask=b < blocks, other=0.0, volatile=True)
        tl.store(norm_ptr + pair, tl.sqrt(tl.sum(parts, axis=0)).to(tl.float32))


def check_device(hidden: torch.Tensor) -> None:
    """Refuse tensors that Triton cannot reach.

    Raises:
        ConfigError: `hidden` is neither on a CUDA device nor on the CPU under the interpreter.
    """
    interpreted = not isinstance(_segment_mean_kernel, triton.JITFunction)
    if hidden.device.type == "cuda" or (interpreted and hidden.device.type == "cpu"):
        return
    raise ConfigError(
        f"impl='triton' needs a CUDA tensor, but hidden is on {hidden.device}; "
        "use impl='auto', or set TRITON_INTERPRET=1 to check the kernel on the CPU"
    )


def segment_mean(hidden: torch.Tensor, segment_of_token: torch.Tensor, n_segments: int) -> torch.Tensor:
    """As `pairtrace.kernels.pooling.segment_mean`, arguments checked there.

    Returns:
        float32 [S, D] on the device of `hidden`.
    """
    D = hidden.shape[1]
    means = torch.empty((n_segments, D), dtype=torch.float32, device=hidden.device)
    if means.numel() == 0:
        return means
    with torch.cuda.device(hidden.device if hidden.device.type == "cuda" else -1):
        _segment_mean_kernel[(n_segments, triton.cdiv(D, BLOCK_D))](
            **_tokens(hidden, segment_of_token, n_segments),
            mean_ptr=means,
            BLOCK_T=BLOCK_T,
            BLOCK_D=BLOCK_D,
            enable_fp_fusion=False,
        )
    return means


def pooled_difference(
    hidden: torch.Tensor,
    segment_of_token: torch.Tensor,
    n_pairs: int,
    shared_weight: torch.Tensor | None,
    dtype: torch.dtype,
    sides: bool,
) -> tuple[torch.Tensor, ...]:
    """As `pairtrace.kernels.pooling.pooled_difference`, arguments checked there.

    Returns:
        diff [P, D], norm [P], and with `sides` chosen and rejected [P, D], on the device of `hidden`.
    """
    D = hidden.shape[1]
    device = hidden.device
    stored = torch.int16 if dtype == torch.bfloat16 else dtype
    diff, *others = (torch.empty((n_pairs, D), dtype=stored, device=device) for _ in range(3 if sides else 1))
    norm = torch.zeros(n_pairs, dtype=torch.float32, device=device)
    blocks = triton.cdiv(D, BLOCK_D)
    if diff.numel():
        with torch.cuda.device(device if device.type == "cuda" else -1):
            _pooled_difference_kernel[(n_pairs, blocks)](
                **_tokens(hidden, segment_of_token, 3 * n_pairs),
                weight_ptr=norm if shared_weight is None else shared_weight.contiguous(),
                diff_ptr=diff,
                chosen_ptr=others[0] if sides else diff,
                rejected_ptr=others[1] if sides else diff,
                squares_ptr=torch.empty((n_pairs, blocks), dtype=torch.float64, device=device),
                done_ptr=torch.zeros(n_pairs, dtype=torch.int32, device=device),
                norm_ptr=norm,
                HAS_WEIGHT=shared_weight is not None,
                SIDES=sides,
                BLOCKS=triton.next_power_of_2(blocks),
                BLOCK_T=BLOCK_T,
                BLOCK_D=BLOCK_D,
                enable_fp_fusion=False,  # a difference of two sides alike is 0, whichever side is fused
            )
    return (diff.view(dtype), norm, *(side.view(dtype) for side in others))


def _tokens(hidden: torch.Tensor, segment_of_token: torch.Tensor, n_segments: int) -> dict[str, Any]:
    """What both kernels read: the tokens, their segments, and where each segment begins and ends."""
    T, D = hidden.shape
    tokens = torch.arange(T, device=hidden.device)
    # Slot 0 takes the tokens that are not pooled; torch's index check catches segments out of range without a wait.
    slots = segment_of_token + 1
    first = torch.full((n_segments + 1,), T, device=hidden.device).scatter_reduce_(0, slots, tokens, "amin")[1:]
    last = torch.full((n_segments + 1,), -1, device=hidden.device).scatter_reduce_(0, slots, tokens, "amax")[1:]
    return {
        "hidden_ptr": hidden.detach(),
        "segment_ptr": segment_of_token,
        "first_ptr": first,
        "last_ptr": last,
        "D": D,
        "token_stride": hidden.stride(0),
        "column_stride": hidden.stride(1),
        "segment_stride": segment_of_token.stride(0),
    }
