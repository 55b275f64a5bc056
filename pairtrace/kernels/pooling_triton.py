"""The GPU kernel behind `pairtrace.kernels.pooling`: imported only when it runs, because Triton is optional.

Letters: T tokens of a pack, D width, S segments.

One launch for all segments. A program sums BLOCK_D columns of one segment over the tokens from its first to its last,
in float32 and in token order: a contiguous segment's bits do not depend on its place in the pack.

The kernel runs on CPU tensors when TRITON_INTERPRET=1 was set before this module was imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pairtrace.errors import ConfigError

BLOCK_T = 32
BLOCK_D = 128


@triton.jit
def _segment_mean_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [T, D] float32, float16 or bfloat16
    segment_ptr,  # [T] int64
    first_ptr,  # [S] int64, first token of each segment
    last_ptr,  # [S] int64, last token; before the first where a segment is empty
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
    # 0 / 0 in a segment without tokens: its mean is NaN.
    tl.store(mean_ptr + segment * D + d, total / tl.sum(count, axis=0).to(tl.float32), mask=d < D)


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
    T, D = hidden.shape
    device = hidden.device
    means = torch.empty((n_segments, D), dtype=torch.float32, device=device)
    if means.numel() == 0:
        return means
    tokens = torch.arange(T, device=device)
    # Slot 0 takes the tokens that are not pooled; torch's index check catches segments out of range without a wait.
    slots = segment_of_token + 1
    first = torch.full((n_segments + 1,), T, device=device).scatter_reduce_(0, slots, tokens, "amin")[1:]
    last = torch.full((n_segments + 1,), -1, device=device).scatter_reduce_(0, slots, tokens, "amax")[1:]
    grid = (n_segments, triton.cdiv(D, BLOCK_D))
    with torch.cuda.device(device if device.type == "cuda" else -1):
        _segment_mean_kernel[grid](
            hidden.detach(),
            segment_of_token,
            first,
            last,
            means,
            D,
            hidden.stride(0),
            hidden.stride(1),
            segment_of_token.stride(0),
            BLOCK_T=BLOCK_T,
            BLOCK_D=BLOCK_D,
        )
    return means
