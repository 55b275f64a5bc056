"""The command that computes the missing rows of a store, from its manifest."""

from __future__ import annotations

import shlex
from pathlib import Path

from pairtrace.store.manifest import Manifest

# A store that was converted by an older pairtrace does not record where the one is that it was made from.
_SOURCE = "SOURCE_STORE"
_COLUMN_OPTIONS = ("prompt", "chosen", "rejected", "source")


def resume_command(manifest: Manifest, store: str) -> str:
    """What to type to run the extraction of a store again; for a converted store, its conversion.

    Every setting that decides what is in the store is spelled out: a default may be another one later.

    Args:
        manifest: what the store was made from.
        store: its path or address.
    """
    if manifest.converted:
        source = _SOURCE if manifest.source_store is None else shlex.quote(manifest.source_store["path"])
        place = shlex.quote(_absolute(store))
        return f"pairtrace store convert {source} {place} --dtype {manifest.dtype} --codec {manifest.codec}"
    settings = {
        "--model": manifest.model,
        "--layers": ",".join(map(str, manifest.layers)),
        "--store": _absolute(store),
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
    return f"{'Convert' if manifest.converted else 'Compute'} them by running {_again(manifest, store)}"


def repair_advice(manifest: Manifest, store: str) -> str:
    """What to do after the mark of a damaged shard was deleted, to be read behind "and"."""
    return f"run {_again(manifest, store)}"


def _again(manifest: Manifest, store: str) -> str:
    command = resume_command(manifest, store)
    if manifest.converted:
        return f"the same conversion again: {command}"
    older = "--split, --chat-template, --template-date and " if manifest.schema_version == 1 else ""
    return (
        f"the same extraction again: {command} "
        f"(and, if it was given then, the same {older}--reuse, which the store does not record)"
    )


def _absolute(store: str) -> str:
    """A local path that works from any directory; an address as it is."""
    return store if "://" in store else str(Path(store).absolute())
