"""Reading bytes of a GPU's memory and doing nothing with them: the yardstick of every kernel there."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

WORDS = 8192
PROGRAMS_PER_UNIT = 16


@triton.jit
def _sum_words(words_ptr, out_ptr, count, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    total = tl.zeros([WORDS], tl.int32)
    step = tl.num_programs(0).to(tl.int64) * WORDS
    for start in range(tl.program_id(0).to(tl.int64) * WORDS, count, step):
        place = start + tl.arange(0, WORDS)
        total += tl.load(words_ptr + place, mask=place < count, other=0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def readers(rows: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Several ways to read all of a contiguous tensor on a GPU once; the fastest counts."""
    words = rows.view(torch.int32).flatten()
    programs = PROGRAMS_PER_UNIT * torch.cuda.get_device_properties(rows.device).multi_processor_count
    sums = torch.empty(programs, dtype=torch.int32, device=rows.device)
    aligned = words.numel() // 16 * 16  # so that the compiler knows masks in groups of 16
    return {
        "read: sum of words": lambda: _sum_words[(programs,)](
            words, sums, aligned, WORDS=WORDS, num_warps=8, enable_fp_fusion=False
        ),
        "read: torch.amax": words.amax,
        "read: torch.sum": lambda: rows.view(torch.float32).sum(),
    }
