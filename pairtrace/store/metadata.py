"""The metadata of a store: reading and checking its manifest and arrays, and creating an empty store.

A store exists once its root `zarr.json` carries the manifest, which is written last. A local directory that
has our lock file, no manifest and no chunk is a creation that was interrupted, and is created again.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from pairtrace.errors import StoreDamagedError, StoreError
from pairtrace.store.layout import array_specs, create_arrays
from pairtrace.store.location import PARTIAL, LocalLocation, Location, fsync_path
from pairtrace.store.lock import LOCK_KEY
from pairtrace.store.manifest import ATTRIBUTE, Manifest

ZARR_JSON = "zarr.json"


def read_manifest(location: Location) -> Manifest | None:
    """The manifest of the store, or None when there is no (finished) store at the location.

    Raises:
        StoreSchemaError: the store has another schema version.
        StoreDamagedError: the metadata or the manifest cannot be read.
    """
    value = _read_json(location, ZARR_JSON)
    if value is None:
        return None
    attributes = value.get("attributes")
    if not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
        return None
    return Manifest.from_json(attributes[ATTRIBUTE], location.name)


def check_arrays(location: Location, manifest: Manifest) -> None:
    """Check that every array is described on disk as the manifest requires.

    Raises:
        StoreDamagedError: an array's `zarr.json` is missing or differs.
    """
    for name, spec in array_specs(manifest).items():
        actual = _read_json(location, f"{name}/{ZARR_JSON}")
        if actual is None:
            raise StoreDamagedError(f"{location.name}: array {name} is damaged: its {ZARR_JSON} is missing")
        for field, expected in spec.metadata().items():
            if _plain(actual.get(field)) != _plain(expected):
                raise StoreDamagedError(
                    f"{location.name}: array {name} is damaged: its {field} is {json.dumps(actual.get(field))}, "
                    f"where the manifest requires {json.dumps(expected)}"
                )


def refuse_foreign_directory(location: LocalLocation) -> None:
    """Check, before anything is written, that a directory is absent, empty or ours.

    Raises:
        StoreError: it is a file, or a directory that holds something else.
    """
    root = location.root
    if not root.exists():
        return
    if not root.is_dir():
        raise StoreError(f"{root} is a file, not an activation store (a directory); choose another path")
    if (
        (root / LOCK_KEY).exists()
        or not any(files for _, _, files in os.walk(root))
        or read_manifest(location) is not None
    ):
        return
    raise StoreError(f"{root} exists, is not empty and is not a pairtrace store; choose another path for the new store")


def has_rows(location: LocalLocation) -> bool:
    """Whether the mark of a shard is there; `discard_unmarked` clears other stores away."""
    return any(key.startswith("status/c/") and not key.endswith(PARTIAL) for key in location.list_keys())


def create_store(location: Location, manifest: Manifest, *, durable: bool) -> None:
    """Create an empty store, the manifest last. A local store must be locked by the caller.

    Raises:
        StoreDamagedError: chunks are there but no manifest: a store that lost its metadata.
        StoreError: something else is at a remote address.
    """
    if isinstance(location, LocalLocation):
        _clear_interrupted_creation(location.root)
        group = location.open_group("a")
    else:
        group = location.open_group("a")
        # This can be an interrupted creation or, as well, somebody else's group: nothing is ever deleted here.
        if strangers := sorted(group.keys()):
            raise StoreError(
                f"{location.name} already holds {', '.join(strangers)} but no pairtrace manifest; "
                "delete it if it is an interrupted creation, or choose another address for the new store"
            )
    create_arrays(group, manifest)
    if isinstance(location, LocalLocation) and durable:
        _fsync_tree(location.root)
    group.attrs[ATTRIBUTE] = manifest.to_json()
    if isinstance(location, LocalLocation) and durable:
        fsync_path(location.root / ZARR_JSON)
        fsync_path(location.root)
        fsync_path(location.root.absolute().parent)


def discard_unmarked(location: LocalLocation, manifest: Manifest, *, durable: bool) -> bool:
    """Take the manifest from a store in which no shard is finished, so that `create_store` starts it over.

    The lock must be held. Chunks without a mark go first and the manifest last: a crash in between leaves an
    empty store, or a creation that was interrupted.

    Args:
        location: the store.
        manifest: its own manifest.
        durable: make every step outlive a power cut before the next one.

    Returns:
        False, with nothing touched, when there is a mark (whole or damaged) or a file that is not the store's.
    """
    specs = array_specs(manifest)
    chunks = {spec.key(shard) for name, spec in specs.items() if name != "status" for shard in range(spec.shards)}
    leftovers = [key for key in location.list_keys() if not _is_creation(key)]
    if not chunks.issuperset(leftovers):
        return False
    for key in leftovers:
        location.remove(key, durable=durable)
    location.remove(ZARR_JSON, durable=durable)
    return True


def remove_partial_files(location: Location) -> None:
    """Remove what a killed writer left half-written, or staged; the lock must be held."""
    for key in location.list_keys():
        if key.endswith(PARTIAL):
            location.remove(key, durable=False)


def require_manifest(location: Location) -> Manifest:
    """The manifest of a store that has to be there.

    Raises:
        StoreError: there is no store at the location.
        StoreSchemaError: the store has another schema version.
        StoreDamagedError: the manifest or an array's description is damaged.
    """
    if isinstance(location, LocalLocation) and not location.is_directory():
        if location.root.exists():
            raise StoreError(f"{location.name} is a file, not an activation store (a directory)")
        raise StoreError(f"{location.name}: no such store; make one with: pairtrace extract DATA --store PATH")
    manifest = read_manifest(location)
    if manifest is None:
        if location.size(LOCK_KEY) is not None:
            raise StoreDamagedError(
                f"{location.name} has no manifest: its creation was interrupted; run the command that began it again"
            )
        raise StoreError(f"{location.name} is not a pairtrace store (it has no {ATTRIBUTE!r} attribute)")
    check_arrays(location, manifest)
    return manifest


def _is_creation(key: str) -> bool:
    """Whether a file may be there without a single chunk having been written."""
    return key == LOCK_KEY or Path(key).name == ZARR_JSON or key.endswith(PARTIAL)


def _clear_interrupted_creation(root: Path) -> None:
    leftovers = [key for key in LocalLocation(root).list_keys() if key != LOCK_KEY]
    for key in leftovers:
        if not _is_creation(key):
            raise StoreDamagedError(
                f"{root} holds data ({key}) but its {ZARR_JSON} has no manifest; "
                "restore that file, or choose another path for the new store"
            )
    for key in leftovers:
        (root / key).unlink()
    # Zarr warns about directories that are no arrays, and the arrays may be other ones this time.
    for folder, _, _ in os.walk(root, topdown=False):
        if Path(folder) != root:
            with contextlib.suppress(OSError):  # not empty: the lock is in it
                Path(folder).rmdir()


def _fsync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for file in files:
            fsync_path(Path(folder) / file)
        fsync_path(Path(folder))


def _read_json(location: Location, key: str) -> dict[str, Any] | None:
    raw = location.read(key)
    if raw is None:
        return None
    try:
        value = json.loads(raw.tobytes())
    except ValueError as error:
        raise StoreDamagedError(f"{location.name}: {key} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise StoreDamagedError(f"{location.name}: {key} is not a JSON object")
    return value


def _plain(value: object) -> object:
    """Drop empty codec configurations, which writers may leave out or spell as {}."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not (k == "configuration" and v == {})}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
