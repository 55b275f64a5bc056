"""The device code behind `pairtrace.kernels.cosine_triton` and `pairtrace.kernels.topk_triton`.

Letters: N pairs (rows), D width, K directions.

`stream_kernel` reads rows once and sums products and squares on the ordinary units: few directions, where memory is the
limit. Without directions it gives what the other kernel needs: the rows' lengths and their powers of two.
`matrix_kernel` multiplies on the tensor cores. Rows and directions enter as float16 parts whose products are exact, as
in Ootomo & Yokota (arXiv 2203.03341): a direction is `high + low` after a power of two that fills float16's range, so
it keeps 22 bits; a float16 or int8 row is itself, any other row `high + low` too. Tensor cores truncate when they add,
so each step's sum starts at zero and joins the total with an ordinary, rounded addition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pairtrace.kernels.cosine_triton_parts import (
    LANES,
    column_vector,
    emit_scores,
    is_exact,
    is_nan,
    lane_sums,
    row_lengths,
    row_tile,
    row_values,
)

SAFE_LOW = tl.constexpr(2.0**-80)
SAFE_HIGH = tl.constexpr(2.0**126)
SCALE_UP = tl.constexpr(2.0**100)
SCALE_DOWN = tl.constexpr(2.0**-100)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    rows_ptr,
    minus_ptr,
    columns_ptr,
    units_ptr,  # [K, D] float32, contiguous
    n,
    D,
    row_stride,
    column_stride,
    minus_stride,
    minus_column_stride,
    row_factor,
    minus_factor,
    after,
    K: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    SCALED: tl.constexpr,
    RESCALE: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Squares [BLOCK_N] and a tuple of K products [BLOCK_N]."""
    squares = tl.zeros([BLOCK_N, BLOCK_D // LANES], tl.float32)
    dots = (tl.zeros([BLOCK_N, BLOCK_D // LANES], tl.float32),) * K
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        values = row_values(
            rows_ptr,
            minus_ptr,
            columns_ptr,
            n,
            d,
            D,
            row_stride,
            column_stride,
            minus_stride,
            minus_column_stride,
            row_factor,
            minus_factor,
            after,
            HAS_MINUS,
            SCALED,
            RESCALE,
            EVEN_D,
        )
        squares += lane_sums(values * values, BLOCK_N, BLOCK_D)
        grown = ()
        for k in tl.static_range(K):
            unit = column_vector(units_ptr + k * D, d, D, EVEN_D)
            grown = grown + (dots[k] + lane_sums(values * unit[None, :], BLOCK_N, BLOCK_D),)  # type: ignore[assignment]
        dots = grown
    sums = ()
    for k in tl.static_range(K):
        sums = sums + (tl.sum(dots[k], axis=1),)  # type: ignore[assignment]
    return tl.sum(squares, axis=1), sums


@triton.jit(do_not_specialize=["first_row"])
def stream_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,  # [N, D] float32, float16, int8 or int16 (bfloat16 bits)
    minus_ptr,  # [N, D] of the same dtype, read only with HAS_MINUS
    columns_ptr,  # [D] float32, read only with SCALED
    row_scale_ptr,  # [N] float32, read only with SCALED
    minus_scale_ptr,  # [N] float32, read only with SCALED and HAS_MINUS
    units_ptr,  # [K, D] float32, contiguous
    norms_ptr,  # [N] float32, read only with HAS_NORMS
    out_ptr,  # as for _emit; [N] float32 lengths where K is 0
    roots_ptr,  # [N] float32, written where K is 0
    thresholds_ptr,
    counts_ptr,
    N,
    D,
    row_step,  # strides in units of ALIGN values, so that the compiler knows what divides them
    column_stride,
    minus_step,
    minus_column_stride,
    first_row,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN_D: tl.constexpr,
    TOPK: tl.constexpr,
    SIGN: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of BLOCK_N rows with up to a few directions; without directions, the rows' lengths and roots."""
    row_stride = row_step * ALIGN
    minus_stride = minus_step * ALIGN
    EXACT: tl.constexpr = is_exact(rows_ptr.dtype.element_ty) and not HAS_MINUS
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.minimum(n, N - 1)  # rows past the end repeat the last one, so that no load needs a mask for them
    scale = tl.full([BLOCK_N], 1.0, tl.float32)
    row_factor = scale
    minus_factor = scale
    if SCALED and HAS_MINUS:
        row_factor = tl.load(row_scale_ptr + own)
        minus_factor = tl.load(minus_scale_ptr + own)
    squares, dots = _sums(
        rows_ptr,
        minus_ptr,
        columns_ptr,
        units_ptr,
        own,
        D,
        row_stride,
        column_stride,
        minus_stride,
        minus_column_stride,
        row_factor,
        minus_factor,
        scale,
        K,
        HAS_MINUS,
        SCALED,
        False,
        EVEN_D,
        BLOCK_N,
        BLOCK_D,
        STAGES,
    )
    safe = (squares >= SAFE_LOW) & (squares <= SAFE_HIGH)
    if tl.min(safe.to(tl.int32), axis=0) == 0:
        scale = tl.where(safe, 1.0, tl.where(squares < SAFE_LOW, SCALE_UP, SCALE_DOWN))
        before = tl.minimum(scale, 1.0)
        squares, dots = _sums(
            rows_ptr,
            minus_ptr,
            columns_ptr,
            units_ptr,
            own,
            D,
            row_stride,
            column_stride,
            minus_stride,
            minus_column_stride,
            row_factor * before,
            minus_factor * before,
            tl.maximum(scale, 1.0),
            K,
            HAS_MINUS,
            SCALED,
            True,
            EVEN_D,
            BLOCK_N,
            BLOCK_D,
            STAGES,
        )
    lengths = row_lengths(squares, scale, own, norms_ptr, row_scale_ptr, HAS_NORMS, SCALED, HAS_MINUS)
    if K == 0:
        # root * root brings the row's norm near 2^14; one factor alone could leave float32's range.
        exponent = ((squares.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        shift = tl.where(scale == 1.0, 0, tl.where(scale > 1.0, 200, -200))
        root_exponent = (28 - exponent + shift) >> 2
        root = ((root_exponent + 127) << 23).to(tl.float32, bitcast=True)
        root = tl.where(is_nan(lengths), 1.0, root)
        if EXACT:
            root = tl.full([BLOCK_N], 1.0, tl.float32)
        tl.store(roots_ptr + n, root, mask=n < N)
        unscale = tl.where(scale == 1.0, 1.0, tl.where(scale > 1.0, SCALE_DOWN, SCALE_UP))
        tl.store(out_ptr + n, (root * unscale) * lengths * root, mask=n < N)
    for k in tl.static_range(K):
        scores = tl.div_rn(dots[k], lengths)[:, None]
        emit_scores(
            scores,
            n,
            k + tl.arange(0, 1),
            N,
            K,
            first_row,
            out_ptr,
            thresholds_ptr,
            counts_ptr,
            TOPK,
            SIGN,
            CAPACITY,
        )


@triton.jit(do_not_specialize=["first_row"])
def matrix_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,  # [N, D] float32, float16, int8 or int16 (bfloat16 bits)
    minus_ptr,  # [N, D] of the same dtype, read only with HAS_MINUS
    columns_ptr,  # [D] float32, read only with SCALED
    row_scale_ptr,  # [N] float32, read only with SCALED
    minus_scale_ptr,  # [N] float32, read only with SCALED and HAS_MINUS
    high_ptr,  # [K padded, D padded] float16, zeros beyond K and D, contiguous
    low_ptr,  # the same
    factors_ptr,  # [K padded] float32, 1 / the power of two within each direction's parts
    norms_ptr,  # [N] float32, read only with FUSED and HAS_NORMS
    lengths_ptr,  # [N] float32, read only without FUSED
    roots_ptr,  # [N] float32, read only without FUSED
    out_ptr,  # as for _emit
    thresholds_ptr,
    counts_ptr,
    N,
    K,
    D,
    padded_step,  # padded D in units of 16
    row_step,  # strides in units of ALIGN values
    column_stride,
    minus_step,
    minus_column_stride,
    first_row,
    ALIGN: tl.constexpr,
    FUSED: tl.constexpr,  # float16 or int8 rows, all directions in one block: norms in the same pass
    HAS_NORMS: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN_D: tl.constexpr,
    TOPK: tl.constexpr,
    SIGN: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of BLOCK_N rows with BLOCK_K directions on the tensor cores."""
    # Blocks of directions come first: programs that run together share their rows in the L2 cache.
    row_stride = row_step * ALIGN
    minus_stride = minus_step * ALIGN
    k_blocks = tl.cdiv(K, BLOCK_K)
    k = (tl.program_id(0) % k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = (tl.program_id(0) // k_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.minimum(n, N - 1)
    EXACT: tl.constexpr = is_exact(rows_ptr.dtype.element_ty) and not HAS_MINUS
    root = tl.full([BLOCK_N], 1.0, tl.float32)
    row_factor = root
    minus_factor = root
    after = root
    if not EXACT:
        root = tl.load(roots_ptr + own)
        before = tl.minimum(root, 1.0)
        after = tl.maximum(root, 1.0)
        row_factor = before
        minus_factor = before
        if SCALED:
            row_factor = before * tl.load(row_scale_ptr + own)
            minus_factor = before * tl.load(minus_scale_ptr + own)
    squares = tl.zeros([BLOCK_N, BLOCK_D // LANES], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        parts = k[None, :] * (padded_step * 16) + d[:, None]
        high = tl.load(high_ptr + parts)
        low = tl.load(low_ptr + parts)
        step = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if EXACT:
            words = row_tile(rows_ptr, own, d, D, row_stride, column_stride, EVEN_D)
            if FUSED:
                values = words.to(tl.float32)
                if SCALED:
                    values = values * column_vector(columns_ptr, d, D, EVEN_D)[None, :]
                squares += lane_sums(values * values, BLOCK_N, BLOCK_D)
            exact = words.to(tl.float16)
        else:
            values = row_values(
                rows_ptr,
                minus_ptr,
                columns_ptr,
                own,
                d,
                D,
                row_stride,
                column_stride,
                minus_stride,
                minus_column_stride,
                row_factor,
                minus_factor,
                after,
                HAS_MINUS,
                SCALED,
                True,
                EVEN_D,
            )
            values = values * root[:, None]
            exact = values.to(tl.float16)
            if rows_ptr.dtype.element_ty == tl.float32 or HAS_MINUS:
                rest = (values - exact.to(tl.float32)).to(tl.float16)
                step = tl.dot(rest, high, step)
        step = tl.dot(exact, low, step)
        step = tl.dot(exact, high, step)
        total = total + step
    if FUSED:
        lengths = row_lengths(tl.sum(squares, axis=1), 1.0, own, norms_ptr, row_scale_ptr, HAS_NORMS, SCALED, HAS_MINUS)
    else:
        lengths = tl.load(lengths_ptr + own)
    dots = total * tl.load(factors_ptr + k)[None, :]
    if HAS_NORMS:  # they may be so small that their inverse is infinite
        scores = tl.div_rn(dots, lengths[:, None] + tl.zeros([BLOCK_N, BLOCK_K], tl.float32))
    else:
        scores = dots * tl.div_rn(1.0, lengths)[:, None]
    emit_scores(scores, n, k, N, K, first_row, out_ptr, thresholds_ptr, counts_ptr, TOPK, SIGN, CAPACITY)
