"""Telling an exhausted memory from other failures."""

from __future__ import annotations


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` says that memory ran out, on a GPU or on the host, so that a smaller batch may succeed."""
    import torch

    # The CPU allocator has no exception type of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
