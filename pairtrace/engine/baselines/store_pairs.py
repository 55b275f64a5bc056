"""The pairs behind a store, as text and as the tokens that the extraction read.

The store names data, checkpoint, tokenizer, template and truncation; whatever else is found there now is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pairtrace.engine.scored_data import open_recorded
from pairtrace.errors import DataMismatchError, StoreMismatchError
from pairtrace.store.layout import OK

if TYPE_CHECKING:
    from pairtrace.engine.pairs import PairSource
    from pairtrace.engine.rendered import RenderedPair
    from pairtrace.engine.rendering import Renderer
    from pairtrace.store.reader import ActivationStore


def open_store_data(store: ActivationStore, data: str | Path | None = None) -> PairSource:
    """Open the data of a store.

    Args:
        store: names the data.
        data: where it is now; None for the path that the store recorded.

    Raises:
        DataError: there is no data where the store recorded it, or it cannot be read.
        DataMismatchError: the data is not what the store was made from.
    """
    return open_recorded(store.manifest.to_json(), data, store.manifest.split, owner=store.path)


def load_store_renderer(store: ActivationStore, base: str, chat_template: str | None = None) -> Renderer:
    """The renderer that the extraction used.

    Args:
        store: names template, date and truncation.
        base: the checkpoint M0, whose tokenizer is loaded.
        chat_template: file with the template; None for the one that the store recorded.

    Raises:
        StoreMismatchError: tokenizer or template differ from the store's.
        ModelError, ConfigError: there is no usable tokenizer or template.
    """
    from pairtrace.engine.checkpoint import load_tokenizer
    from pairtrace.engine.fingerprints import fingerprints
    from pairtrace.engine.rendering import Renderer
    from pairtrace.engine.templates import chat_template_of

    manifest = store.manifest
    tokenizer = load_tokenizer(base)
    template = chat_template_of(tokenizer, chat_template or manifest.chat_template, manifest.template_date)
    found = fingerprints(tokenizer, template)
    for field, actual in zip(("tokenizer_fingerprint", "template_fingerprint"), found, strict=True):
        if getattr(manifest, field) != actual:
            raise StoreMismatchError(
                field, actual, getattr(manifest, field), f"give the checkpoint of the extraction instead of {base}"
            )
    return Renderer(tokenizer, max_length=manifest.max_length, truncation=manifest.truncation, chat_template=template)


def require_store_model(store: ActivationStore, base: str) -> str:
    """The fingerprint of the checkpoint `base`, which has to be the one that the store was made with.

    Raises:
        StoreMismatchError: it is another checkpoint.
        ModelError: it is no checkpoint.
    """
    from pairtrace.engine.checkpoint import model_fingerprint

    actual, stored = model_fingerprint(base), store.manifest.model_fingerprint
    if actual != stored:
        raise StoreMismatchError(
            "model_fingerprint", actual, stored, f"give the checkpoint of the extraction (M0) instead of {base}"
        )
    return actual


def rendered_blocks(
    store: ActivationStore, source: PairSource, renderer: Renderer, block_rows: int, start: int = 0
) -> Iterator[tuple[int, list[RenderedPair | None]]]:
    """All pairs of a store from row `start` on, rendered, in blocks.

    Args:
        store: complete.
        source: its data, see `open_store_data`.
        renderer: see `load_store_renderer`.
        block_rows: rows per block.
        start: first row, a multiple of `block_rows`.

    Yields:
        first row of the block, and its pairs; None for a row that the store quarantined.

    Raises:
        DataMismatchError: a pair is rendered to other tokens than those that the store holds.
    """
    from pairtrace.engine.rendered import Quarantined

    usable, identifiers = store.status() == OK, store.pair_ids()
    pairs = source.read(start)
    while block := list(islice(pairs, block_rows)):
        results: list[RenderedPair | None] = []
        for row, result in enumerate(renderer.render(block), start):
            if not usable[row]:
                results.append(None)
                continue
            if isinstance(result, Quarantined) or result.pair_id != identifiers[row].tobytes():
                raise DataMismatchError(
                    f"row {row} is not rendered to the tokens that {store.path} was made from; extract again with "
                    "this version of pairtrace and of the tokenizer's libraries"
                )
            results.append(result)
        yield start, results
        start += len(block)
