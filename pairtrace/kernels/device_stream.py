"""Rows in host memory, scored on a device while the next block is on its way there.

Letters: n rows of a block, D width, K directions.

Two blocks take turns: while one is scored the other is copied, and the scores of the one before return. Rows in
page-locked memory are copied from where they are; other rows pass through a page-locked block of their own, because
only such memory is copied without holding up the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from pairtrace.errors import ConfigError, MissingDependencyError
from pairtrace.kernels.cosine import cosine_scores
from pairtrace.kernels.cosine_inputs import UnitDirections, check_rows, prepare_directions, prepared_directions
from pairtrace.kernels.int8 import ScaledRows

if TYPE_CHECKING:
    import torch

RowDtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
HostBlock: TypeAlias = "np.ndarray | ScaledRows"


def stream_scores(
    blocks: Iterable[tuple[int, HostBlock]],
    directions: np.ndarray | torch.Tensor | UnitDirections,
    device: str | torch.device,
    *,
    row_dtype: RowDtype | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Cosine of every row of a stream with every direction.

    Args:
        blocks: first row and rows [n, D] of each block, numpy arrays as for `cosine_scores` or `ScaledRows`. A block
            must stay as it is until the second block after it is asked for.
        directions: [D] or [K, D], as for `cosine_scores`.
        device: "cpu" or a CUDA device.
        row_dtype: what the words of a uint16 array are.

    Returns:
        Iterator over the first row and the scores float32 [n, K] of each block, in order, in host memory; the arrays
        are the caller's to keep. On a CUDA device a block's scores come after the next block was asked for.

    Raises:
        ConfigError: rows cannot be used, or the device is of another kind.
        DirectionError: as for `cosine_scores`.
        MissingDependencyError: a CUDA device without Triton.
    """
    import torch

    target = torch.device(device)
    if target.type not in ("cpu", "cuda"):
        raise ConfigError(f"scores are streamed on 'cpu' or 'cuda', not on {str(target)!r}")
    units = directions if isinstance(directions, UnitDirections) else prepare_directions(directions)
    if target.type == "cpu":
        return ((start, cosine_scores(rows, units, row_dtype=row_dtype)) for start, rows in blocks)
    try:
        from pairtrace.kernels.cosine_triton import DeviceDirections
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] == "triton":
            raise MissingDependencyError("triton", "gpu", "cosine scoring on a GPU") from error
        raise
    if target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    prepared = DeviceDirections(units.exact, target)

    def check(rows: HostBlock) -> None:
        check_rows(rows, row_dtype)
        prepared_directions(units, rows.shape[1])

    return _overlapped(blocks, prepared, check)


@dataclass
class _Slot:
    """One of the two blocks under way.

    Attributes:
        held: buffers by name: `device_*` on the device, `host_*` page-locked.
        copied: passed when the rows have arrived.
        scored: passed when the kernel has read them.
        returned: passed when the scores are back in host memory.
        start: first row of the block.
        scores: page-locked float32 [n, K].
        source: the caller's rows, kept until they are copied.
    """

    held: dict[str, torch.Tensor]
    copied: torch.cuda.Event
    scored: torch.cuda.Event
    returned: torch.cuda.Event
    start: int = 0
    scores: torch.Tensor | None = None
    source: HostBlock | None = None

    def buffer(self, name: str, like: torch.Tensor, **place: Any) -> torch.Tensor:
        """A buffer of at least the size of `like`, cut to its shape; it grows, and is kept for the next block."""
        import torch

        kept = self.held.get(name)
        if kept is None or kept.numel() < like.numel() or kept.dtype != like.dtype:
            kept = self.held[name] = torch.empty(like.numel(), dtype=like.dtype, **place)
        return kept[: like.numel()].view(like.shape)


def _overlapped(
    blocks: Iterable[tuple[int, HostBlock]], directions: Any, check: Callable[[HostBlock], None]
) -> Iterator[tuple[int, np.ndarray]]:
    import torch

    device = directions.device
    with torch.cuda.device(device):
        incoming, compute, outgoing = (torch.cuda.Stream() for _ in range(3))
        compute.wait_stream(torch.cuda.current_stream())  # the directions come from there
        slots = [_Slot({}, torch.cuda.Event(), torch.cuda.Event(), torch.cuda.Event()) for _ in range(2)]
    waiting: _Slot | None = None
    try:
        for number, (start, rows) in enumerate(blocks):
            check(rows)
            slot = slots[number % 2]
            with torch.cuda.device(device):
                slot.start, slot.source = start, rows
                on_device = _send(slot, rows, incoming, device)
                slot.copied.record(incoming)
                compute.wait_event(slot.copied)
                with torch.cuda.stream(compute):
                    scores = directions.score(on_device)
                    slot.scored.record(compute)
                outgoing.wait_event(slot.scored)
                with torch.cuda.stream(outgoing):
                    slot.scores = torch.empty(scores.shape, dtype=torch.float32, pin_memory=True)
                    slot.scores.copy_(scores, non_blocking=True)
                    scores.record_stream(outgoing)
                    slot.returned.record(outgoing)
            if waiting is not None:
                yield _received(waiting)
            waiting = slot
        if waiting is not None:
            yield _received(waiting)
    finally:  # a caller that stops early frees the buffers: nothing may still be using them
        torch.cuda.synchronize(device)


def _received(slot: _Slot) -> tuple[int, np.ndarray]:
    assert slot.scores is not None
    slot.returned.synchronize()
    scores = slot.scores.numpy()
    slot.scores = slot.source = None
    return slot.start, scores


def _send(slot: _Slot, rows: HostBlock, stream: torch.cuda.Stream, device: torch.device) -> Any:
    """Begin copying a block; the kernel that read the slot's last block comes first, as its scores are back."""
    import torch

    from pairtrace.kernels.device_rows import DeviceScaledRows

    parts = (
        {"values": rows.values, "row_scale": rows.row_scale, "column_scale": rows.column_scale}
        if isinstance(rows, ScaledRows)
        else {"rows": rows}
    )
    arrived = {}
    for name, array in parts.items():
        words = array.view(np.int16) if array.dtype == np.uint16 else array
        source = _tensor(words)
        if not (source.is_contiguous() and source.is_pinned()):
            staged = slot.buffer(f"host_{name}", source, pin_memory=True)
            staged.copy_(source)
            source = staged
        with torch.cuda.stream(stream):
            target = slot.buffer(f"device_{name}", source, device=device)
            target.copy_(source, non_blocking=True)
        arrived[name] = target.view(torch.bfloat16) if array.dtype == np.uint16 else target
    return DeviceScaledRows(**arrived) if isinstance(rows, ScaledRows) else arrived["rows"]


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over the array's memory, which is only read: torch warns of read-only arrays such as memory maps."""
    import torch

    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


class _Writable:
    """Numpy's interface to a read-only array's memory, without the flag."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the memory
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}
