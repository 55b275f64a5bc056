"""How responses are read through the base model, so that a direction fits the store that it is meant for."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pairtrace.engine.behavior_config import BehaviorConfig
from pairtrace.errors import StoreMismatchError

if TYPE_CHECKING:
    from pairtrace.store.manifest import Manifest

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 1024
DEFAULT_TRUNCATION = "keep_start"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Settings of the forward passes that read responses.

    Attributes:
        layers: residual layers, ascending.
        max_length: longest sequence in tokens; None for no limit.
        truncation: "keep_start" or "keep_end".
        dtype: of the forward pass; "auto" is the checkpoint's own.
        store: path of the store that the directions are meant for, or None.
        store_format: format of the data in that store, or None.
        same_rendering: whether the store's pairs went through the chat template as the responses do; None without
            a store.
    """

    layers: tuple[int, ...]
    max_length: int | None
    truncation: str
    dtype: str
    store: str | None = None
    store_format: str | None = None
    same_rendering: bool | None = None


def choose_reading(config: BehaviorConfig, store: Manifest | None, depth: int) -> Reading:
    """Settings from the options, and from the store where they are silent.

    Args:
        config: of the behaviour.
        store: manifest of `config.store`.
        depth: number of blocks of the base model.

    Raises:
        StoreMismatchError: an option contradicts the store.
    """
    layers = None if config.layers is None else tuple(sorted(set(config.layers)))
    if store is None:
        return Reading(
            layers=layers or tuple(range(1, depth + 1)),
            max_length=DEFAULT_MAX_LENGTH if config.max_length is None else config.max_length or None,
            truncation=config.truncation or DEFAULT_TRUNCATION,
            dtype=config.dtype,
        )
    if layers is not None and not set(layers) <= set(store.layers):
        raise StoreMismatchError(
            "layers", layers, store.layers, "choose --layers among those of the store, or extract the others too"
        )
    # None stands for an option that was not given; 0 for no limit, which the store writes as None.
    for name, given, actual in (
        ("max_length", config.max_length, store.max_length or 0),
        ("truncation", config.truncation, store.truncation),
        ("compute_dtype", None if config.dtype == "auto" else config.dtype, store.compute_dtype),
    ):
        if given is not None and given != actual:
            option = "--" + name.replace("_", "-")
            raise StoreMismatchError(
                name, given, actual, f"leave out {option}, or give a --store that was extracted with it"
            )
    reading = Reading(
        layers=layers or store.layers,
        max_length=store.max_length,
        truncation=store.truncation,
        dtype=store.compute_dtype,
        store=config.store,
        store_format=store.data_format,
        same_rendering=not store.data_format.startswith("standard"),
    )
    if not reading.same_rendering:
        logger.warning(
            "%s holds plain text (format %s) that no chat template was applied to, but the responses of the behaviour "
            "are read through the chat template: the direction and the pairs it will score are not rendered alike",
            config.store,
            store.data_format,
        )
    return reading


def fitting_store(path: str, prints: dict[str, Any]) -> Manifest:
    """The manifest of the store that directions are meant for.

    Args:
        path: of the store.
        prints: fingerprints that it must have, by manifest field.

    Raises:
        StoreMismatchError: it was made with another model, tokenizer or template.
    """
    from pairtrace.store.reader import ActivationStore

    manifest = ActivationStore.open(path, allow_incomplete=True).manifest
    for field, expected in prints.items():
        actual = getattr(manifest, field)
        if actual != expected:
            raise StoreMismatchError(
                field, expected, actual, "give the --base and --chat-template that the store was extracted with"
            )
    return manifest
