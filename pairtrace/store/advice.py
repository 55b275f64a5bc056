"""The command that computes the missing rows of a store, from its manifest."""

from __future__ import annotations

import shlex

from pairtrace.store.manifest import Manifest

# A store does not record where the one that it was converted from is.
_SOURCE = "SOURCE_STORE"
_COLUMN_OPTIONS = ("prompt", "chosen", "rejected", "source")


def resume_command(manifest: Manifest, store: str) -> str:
    """What to type to run the extraction of a store again; for a converted store, its conversion.

    Every setting that decides what is in the store is spelled out: a default may be another one later.

    Args:
        manifest: what the store was made from.
        store: its path or address.
    """
    if manifest.converted_from is not None:
        return (
            f"pairtrace store convert {_SOURCE} {shlex.quote(store)} --dtype {manifest.dtype} --codec {manifest.codec}"
        )
    settings = {
        "--model": manifest.model,
        "--layers": ",".join(map(str, manifest.layers)),
        "--store": store,
        "--dtype": manifest.dtype,
        "--codec": manifest.codec,
        "--compute-dtype": manifest.compute_dtype,
        "--max-length": str(manifest.max_length or 0),
        "--truncation": manifest.truncation,
        "--limit": None if manifest.limit is None else str(manifest.limit),
        "--format": manifest.data_format,
        **{f"--{name}": manifest.columns.get(name) for name in _COLUMN_OPTIONS},
        "--split": manifest.split,
        "--chat-template": manifest.chat_template,
        "--template-date": manifest.template_date,
    }
    words = ["pairtrace", "extract", manifest.data]
    for option, value in settings.items():
        words += [] if value is None else [option, value]
    return shlex.join([*words, "--sides"] if manifest.sides else words)


def resume_advice(manifest: Manifest, store: str) -> str:
    """`resume_command` in words, with what the manifest does not hold."""
    command = resume_command(manifest, store)
    if manifest.converted_from is not None:
        return f"Convert them by running the same conversion again: {command}"
    older = "--split, --chat-template, --template-date and " if manifest.schema_version == 1 else ""
    return (
        f"Compute them by running the same extraction again: {command} "
        f"(and, if it was given then, the same {older}--reuse, which the store does not record)"
    )
