"""Which behaviours are scored at which layer of a store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from pairtrace.engine.directions import Direction, load_directions
from pairtrace.errors import DirectionError, LayerError
from pairtrace.store.reader import ActivationStore

logger = logging.getLogger(__name__)


def select_directions(
    store: ActivationStore, paths: Sequence[str], layer: int | None, *, note: bool = True
) -> tuple[int, list[Direction]]:
    """Load the direction files for one layer of the store; `note` as for `load_directions`.

    Returns:
        The layer, and the behaviours at that layer with unique names.

    Raises:
        DirectionError, LayerError: see `score`.
    """
    if layer is not None and layer not in store.layers:
        raise LayerError(f"layer {layer} is not in {store.path}, which holds layers {list(store.layers)}")
    chosen = _deepest_common_layer(store, paths) if layer is None else layer
    found: dict[str, Direction] = {}
    for path in paths:
        loaded = load_directions(
            path,
            layer=chosen,
            width=store.width,
            model_fingerprint=store.manifest.model_fingerprint,
            tokenizer_fingerprint=store.manifest.tokenizer_fingerprint,
            note=note,
        )
        for direction in loaded:
            direction.require_responses()
            if direction.name in found:
                raise DirectionError(
                    f"the behaviour {direction.name!r} is in {found[direction.name].origin} and in {path}; "
                    "names must be unique: rename one with --name when building it, or rename the file"
                )
            expected = store.manifest.template_fingerprint
            if direction.template_fingerprint not in (None, expected):
                logger.warning(
                    "%s: %r was made with another chat template (%s) than the store (%s)",
                    path, direction.name, direction.template_fingerprint, expected,
                )  # fmt: skip
            found[direction.name] = replace(direction, layer=chosen)
    return chosen, list(found.values())


def _deepest_common_layer(store: ActivationStore, paths: Sequence[str]) -> int:
    common = set(store.layers)
    told = False
    listed = []
    for path in paths:
        by_name: dict[str, set[int]] = {}
        for direction in load_directions(path, note=False):
            if direction.layer is not None:
                by_name.setdefault(direction.name, set()).add(direction.layer)
        for name, layers in by_name.items():
            common &= layers
            told = True
            listed.append(f"{name} in {path}: {sorted(layers)}")
    if not common:
        raise LayerError(
            f"no layer is common to the store ({list(store.layers)}) and all behaviours ({'; '.join(listed)}); "
            "build the behaviours again with one of the store's layers"
        )
    if not told and len(common) > 1:
        raise LayerError(
            f"{', '.join(paths)} do not say which layer they belong to, and the store holds layers "
            f"{list(store.layers)}; choose one with --layer"
        )
    return max(common)
