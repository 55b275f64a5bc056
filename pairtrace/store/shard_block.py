"""One shard as it is handed to a writer: its rows, what has to hold for them, and the bytes that they become.

Legend: n rows of the shard, S rows per shard, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pairtrace.kernels.int8 import ScaledRows, encode_int8
from pairtrace.store.chunks import encode
from pairtrace.store.layout import OK, QUARANTINED, ArraySpec, is_scale, is_scaled, nonfinite_rows, scale_names
from pairtrace.store.location import RawBytes
from pairtrace.store.manifest import Manifest

Values = np.ndarray | ScaledRows | list[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardBlock:
    """Everything about the n rows of one shard (n = S, fewer in the last shard).

    Quarantined rows hold zeros in every numeric array but `pair_id` and `tokens`, which are free.

    Attributes:
        index: number of the shard; its first row is index * S.
        pair_id: uint8 [n, 16].
        tokens: int32 [n, 3], counts of prompt, chosen and rejected tokens.
        status: uint8 [n], 1 ok or 2 quarantined.
        reason: n strings; why a row is quarantined, "" for an ok row.
        source: n strings; where the pair comes from.
        diff: per layer [n, D] in the type of the store (bfloat16 as its uint16 bits); for an int8 store float32, which
            the writer rounds, or `ScaledRows`.
        norm: per layer float32 [n], norm of the difference before it was rounded.
        chosen: per layer like `diff`, or None in a store without sides.
        rejected: per layer like `diff`, or None in a store without sides.
    """

    index: int
    pair_id: np.ndarray
    tokens: np.ndarray
    status: np.ndarray
    reason: list[str]
    source: list[str]
    diff: Mapping[int, np.ndarray | ScaledRows]
    norm: Mapping[int, np.ndarray]
    chosen: Mapping[int, np.ndarray | ScaledRows] | None = None
    rejected: Mapping[int, np.ndarray | ScaledRows] | None = None


def checked_values(block: ShardBlock, manifest: Manifest, specs: Mapping[str, ArraySpec]) -> dict[str, Values]:
    """The block's content by array name, checked against the layout; int8 rows not yet apart from their scales."""
    values: dict[str, Values] = {
        "pair_id": block.pair_id,
        "tokens": block.tokens,
        "status": block.status,
        "reason": block.reason,
        "source": block.source,
    }
    assert (block.chosen is not None) == (block.rejected is not None) == manifest.sides
    groups = {"diff": block.diff, "norm": block.norm, "chosen": block.chosen, "rejected": block.rejected}
    for group, layers in groups.items():
        if layers is not None:
            values |= {f"{group}/{layer}": array for layer, array in layers.items()}
    expected = {name for name in specs if not is_scale(name)}
    assert set(values) == expected, f"{sorted(values)} is not {sorted(expected)}"
    start, stop = specs["status"].span(block.index)
    for name, array in values.items():
        spec = specs[name]
        if spec.is_text:
            assert len(array) == stop - start, f"{name}: {len(array)} strings"
            continue
        assert not isinstance(array, list)
        assert array.shape == (stop - start, *spec.row_shape), f"{name}: shape {array.shape}"
        if isinstance(array, ScaledRows):
            assert is_scaled(name, specs), f"{name}: this is no int8 store"
        else:
            wanted = np.dtype(np.float32) if is_scaled(name, specs) else spec.numpy_dtype
            assert array.dtype == wanted, f"{name}: {array.dtype} is not {wanted}"
    ok = block.status == OK
    assert (ok | (block.status == QUARANTINED)).all(), "every row is ok or quarantined"
    assert block.pair_id[ok].any(axis=1).all(), "an ok row has a pair_id"
    dtype = "float32" if manifest.dtype == "int8" else manifest.dtype
    for layer in manifest.layers:
        assert not nonfinite_rows(block.diff[layer], dtype)[ok].any(), (
            f"layer {layer}: rows that are not finite have to be quarantined"
        )
    return values


def shard_objects(
    shard: int, values: Mapping[str, Values], specs: Mapping[str, ArraySpec]
) -> dict[str, Sequence[RawBytes]]:
    """The chunks of one shard by their keys, as `Location.write` takes them."""
    arrays: dict[str, np.ndarray | list[str]] = {}
    for name, content in values.items():
        if is_scaled(name, specs):
            assert not isinstance(content, list)
            rows = content if isinstance(content, ScaledRows) else encode_int8(content)
            row_scale, column_scale = scale_names(name)
            arrays |= {name: rows.values, row_scale: rows.row_scale, column_scale: rows.column_scale[None]}
        else:
            assert not isinstance(content, ScaledRows)
            arrays[name] = content
    return {(spec := specs[name]).key(shard): encode(spec, arrays[name]) for name in arrays}
