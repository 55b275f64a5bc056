"""Versions of everything that takes part in a value, for manifests."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from pairtrace.version import __version__

LIBRARIES = ("torch", "transformers", "tokenizers", "zarr", "numpy")


def library_versions() -> dict[str, str]:
    """Installed versions of pairtrace and the libraries that decide the values, by name."""
    return {"pairtrace": __version__, **{name: _installed(name) for name in LIBRARIES}}


@cache
def _installed(name: str) -> str:
    # A library's metadata take milliseconds to parse, and stay as they are while a process runs.
    return metadata.version(name)
