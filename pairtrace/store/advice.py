"""The command that computes the missing rows of a store, from its manifest."""

from __future__ import annotations

import shlex

from pairtrace.store.manifest import Manifest

_COLUMN_OPTIONS = ("prompt", "chosen", "rejected", "source")


def resume_command(manifest: Manifest, store: str) -> str:
    """What to type to run the extraction of a store again.

    Every setting that decides what is in the store is spelled out: a default may be another one later.

    Args:
        manifest: what the store was made from.
        store: its path or address.
    """
    settings = {
        "--model": manifest.model,
        "--layers": ",".join(map(str, manifest.layers)),
        "--store": store,
        "--dtype": manifest.dtype,
        "--compute-dtype": manifest.compute_dtype,
        "--max-length": str(manifest.max_length or 0),
        "--truncation": manifest.truncation,
        "--limit": None if manifest.limit is None else str(manifest.limit),
        "--format": manifest.data_format,
        **{f"--{name}": manifest.columns.get(name) for name in _COLUMN_OPTIONS},
    }
    words = ["pairtrace", "extract", manifest.data]
    for option, value in settings.items():
        words += [] if value is None else [option, value]
    return shlex.join([*words, "--sides"] if manifest.sides else words)


def resume_advice(manifest: Manifest, store: str) -> str:
    """`resume_command` in words, with what the manifest does not hold."""
    return (
        f"Compute them by running the same extraction again: {resume_command(manifest, store)} "
        "(and, if they were given then, the same --split, --chat-template, --template-date and --reuse, "
        "which a store does not record)"
    )
