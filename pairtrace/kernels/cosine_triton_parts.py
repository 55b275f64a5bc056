"""Device functions that the kernels of `pairtrace.kernels.cosine_triton_kernels` are made of: read, sum, divide, rank.

Letters: N pairs (rows), D width, K directions.

A row counts by `(rows * before - minus * before) * after`, powers of two that keep squares within float32's range.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Values that a thread sums on its own: 16 bytes of float16.
LANES = tl.constexpr(8)


@triton.constexpr_function
def is_exact(dtype: tl.dtype) -> bool:
    """Whether float16 holds every value, without a scale of the row."""
    return bool(dtype in (tl.float16, tl.int8))


@triton.jit
def as_float32(words):  # type: ignore[no-untyped-def]
    """float32 of any stored value; int16 holds bfloat16 bits (the interpreter's own cast is wrong for denormals)."""
    if words.dtype == tl.int16:
        return (words.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return words.to(tl.float32)


@triton.jit
def row_tile(ptr, n, d, D, row_stride, column_stride, EVEN_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words [BLOCK_N, BLOCK_D]; the rows `n` exist, the columns may end."""
    places = ptr + n[:, None] * row_stride + d[None, :] * column_stride
    if EVEN_D:
        return tl.load(places)
    return tl.load(places, mask=(d < D)[None, :], other=0)


@triton.jit
def row_values(  # type: ignore[no-untyped-def]
    rows_ptr,  # [N, D] float32, float16, int8 or int16 (bfloat16 bits)
    minus_ptr,  # the same, read only with HAS_MINUS
    columns_ptr,  # [D] float32, column scales, read only with SCALED
    n,
    d,
    D,
    row_stride,
    column_stride,
    minus_stride,
    minus_column_stride,
    row_factor,  # [BLOCK_N] float32, used with RESCALE or HAS_MINUS and SCALED
    minus_factor,  # [BLOCK_N] float32
    after,  # [BLOCK_N] float32, used with RESCALE
    HAS_MINUS: tl.constexpr,
    SCALED: tl.constexpr,
    RESCALE: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """float32 [BLOCK_N, BLOCK_D] of the rows, or of their differences."""
    values = as_float32(row_tile(rows_ptr, n, d, D, row_stride, column_stride, EVEN_D))
    if RESCALE or (HAS_MINUS and SCALED):
        values = values * row_factor[:, None]
    if HAS_MINUS:
        others = as_float32(row_tile(minus_ptr, n, d, D, minus_stride, minus_column_stride, EVEN_D))
        if RESCALE or SCALED:
            others = others * minus_factor[:, None]
        values = values - others
    if SCALED:
        values = values * column_vector(columns_ptr, d, D, EVEN_D)[None, :]
    if RESCALE:
        values = values * after[:, None]
    return values


@triton.jit
def column_vector(ptr, d, D, EVEN_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [BLOCK_D] of a vector that the columns belong to."""
    if EVEN_D:
        return tl.load(ptr + d)
    return tl.load(ptr + d, mask=d < D, other=0.0)


@triton.jit
def is_nan(values):  # type: ignore[no-untyped-def]
    """Where values are NaN."""
    return values != values  # noqa: PLR0124


@triton.jit
def lane_sums(products, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_N, BLOCK_D // LANES]: sums of neighboring columns, which one thread holds; lanes meet only at the end."""
    return tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_D // LANES, LANES]), axis=2)


@triton.jit
def ordered_bits(bits):  # type: ignore[no-untyped-def]
    """Bits of a float32 as an integer of the same order, and back."""
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def append_candidates(  # type: ignore[no-untyped-def]
    scores,  # [BLOCK_N, BLOCK_K]
    n,
    k,
    N,
    K,
    first_row,
    thresholds_ptr,  # [K] int64 keys that a candidate must exceed
    keys_ptr,  # [K, CAPACITY] int64
    counts_ptr,  # [K + 1] int32: candidates of each direction, then rows without a score
    SIGN: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Append the keys of scores beyond their direction's threshold; counts go on past a full buffer."""
    inside = (n < N)[:, None] & (k < K)[None, :]
    ranked = scores * SIGN
    ranked = tl.where(ranked == 0.0, 0.0, ranked)  # -0 equals 0: their rows decide
    thresholds = tl.load(thresholds_ptr + k, mask=k < K, other=0)
    # The threshold's score, NaN for the lowest key: most blocks are done after one comparison.
    limit = ordered_bits((thresholds >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    likely = inside & (is_nan(scores) == 0) & ((ranked < limit[None, :]) == 0)
    if tl.max(tl.max(likely.to(tl.int32), axis=1), axis=0) > 0:
        order = ordered_bits(ranked.to(tl.int32, bitcast=True)).to(tl.int64)
        keys = (order << 32) + (0xFFFFFFFF - (first_row + n))[:, None]
        keep = likely & (keys > thresholds[None, :])
        found = tl.sum(keep.to(tl.int32), axis=0)
        base = tl.atomic_add(counts_ptr + k, found, mask=(k < K) & (found > 0), sem="relaxed")
        places = base[None, :] + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        slots = keys_ptr + k[None, :].to(tl.int64) * CAPACITY + places
        tl.store(slots, keys, mask=keep & (places < CAPACITY))
    broken = is_nan(scores) & inside & (k == 0)[None, :]
    lost = tl.sum(tl.sum(broken.to(tl.int32), axis=1), axis=0)
    if lost > 0:
        tl.atomic_add(counts_ptr + K, lost, sem="relaxed")


@triton.jit
def emit_scores(  # type: ignore[no-untyped-def]
    scores,
    n,
    k,
    N,
    K,
    first_row,
    out_ptr,  # [N, K] float32, contiguous; with TOPK [K, CAPACITY] int64
    thresholds_ptr,
    counts_ptr,
    TOPK: tl.constexpr,
    SIGN: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Store scores [BLOCK_N, BLOCK_K], or with TOPK append those that may be among the best."""
    if TOPK:
        append_candidates(scores, n, k, N, K, first_row, thresholds_ptr, out_ptr, counts_ptr, SIGN, CAPACITY)
    else:
        tl.store(out_ptr + n[:, None] * K + k[None, :], scores, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def row_lengths(  # type: ignore[no-untyped-def]
    squares,  # [BLOCK_N] of the rows times `scale`
    scale,
    n,
    norms_ptr,
    row_scale_ptr,
    HAS_NORMS: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_MINUS: tl.constexpr,
):
    """What products are divided by, [BLOCK_N]; NaN for a row that has no score."""
    usable = (squares > 0.0) & (squares < float("inf"))
    lengths = tl.sqrt_rn(squares)
    if HAS_NORMS:
        norms = tl.load(norms_ptr + n)
        usable = usable & (norms > 0.0) & (norms < float("inf"))
        lengths = norms * scale
    if SCALED and not HAS_MINUS:  # products and squares leave the row's own scale out
        row_scale = tl.load(row_scale_ptr + n)
        usable = usable & (row_scale > 0.0) & (row_scale < float("inf"))
        if HAS_NORMS:
            lengths = tl.div_rn(lengths, row_scale)
    return tl.where(usable, lengths, float("nan"))
