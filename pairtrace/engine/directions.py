"""Direction files: behaviours as vectors or banks of vectors in the residual stream.

Legend: K directions of a bank (1 for a vector), D width.

A file is safetensors with one float32 tensor per behaviour and layer named `{behavior}/{layer}`, [D] for a vector
and [K, D] for a bank, and a JSON manifest under the metadata key "pairtrace". Further tensors that its entry "tensors"
names (a probe's members and biases) are no directions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pairtrace.engine.atomic import replacing
from pairtrace.errors import DirectionError, LayerError

logger = logging.getLogger(__name__)

Kind = Literal["vector", "bank"]
ReadAt = Literal["responses", "prompt_end"]
RESPONSES: ReadAt = "responses"
PROMPT_END: ReadAt = "prompt_end"
SCHEMA_VERSION = 1
METADATA_KEY = "pairtrace"
_FINGERPRINTS = ("model_fingerprint", "tokenizer_fingerprint", "template_fingerprint")
_COMMON = (*_FINGERPRINTS, "read_at")
# What numpy can hold, and bfloat16, which is widened; anything narrower is no direction.
_TENSOR_TYPES = frozenset(("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"))
DIRECTION_SUFFIXES = (".safetensors", ".npy")
_NAME = re.compile(r"[^\s/:]+")


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """One behaviour at one layer.

    Attributes:
        name: of the behaviour; no whitespace, slash or colon.
        layer: residual layer it was made at; None for a foreign file that does not say.
        values: float32 [K, D], finite, no row zero; not normalized.
        kind: "vector" (K = 1) or "bank" (a pair scores the maximum over the rows).
        origin: the file it came from, or how it was made.
        model_fingerprint: of the checkpoint whose activations it was made from; None when unknown.
        tokenizer_fingerprint: of the tokenizer it was made with; None when unknown.
        template_fingerprint: of the chat template it was made with; None when unknown.
        read_at: the tokens whose states it was made of: "responses", as a store's rows are, or "prompt_end", the last
            token of the prompts.
    """

    name: str
    layer: int | None
    values: np.ndarray
    kind: Kind
    origin: str
    model_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    template_fingerprint: str | None = None
    read_at: ReadAt = RESPONSES

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DirectionError(
                f"{self.origin}: {self.name!r} cannot name a behaviour; use no whitespace, slash or colon"
            )
        assert self.values.ndim == 2 and self.values.dtype == np.float32, (self.values.shape, self.values.dtype)
        assert self.kind == "bank" or len(self.values) == 1
        where = f"{self.origin}: direction {self.name!r}" + ("" if self.layer is None else f", layer {self.layer}")
        if 0 in self.values.shape:
            raise DirectionError(f"{where} is empty (shape {list(self.values.shape)})")
        broken = np.flatnonzero(~np.isfinite(self.values).all(axis=1))
        if broken.size:
            raise DirectionError(f"{where}: row {broken[0]} holds NaN or infinity; expected finite values")
        zero = np.flatnonzero(~self.values.any(axis=1))
        if zero.size:
            raise DirectionError(f"{where}: row {zero[0]} is zero and has no cosine with anything")

    def require_responses(self) -> None:
        """Check that cosines with the rows of a store mean something.

        Raises:
            DirectionError: it was read at other tokens than they.
        """
        if self.read_at != RESPONSES:
            raise DirectionError(
                f"{self.origin}: {self.name!r} was read at {self.read_at}, but the rows of a store over responses: "
                "their cosines say nothing; `pairtrace behavior` makes a direction to score with"
            )

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over kind, layer, shape and values."""
        head = json.dumps([self.kind, self.layer, list(self.values.shape)]).encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.values, dtype="<f4").tobytes()).hexdigest()


def direction_name(name: str | None, out: str) -> str:
    """The name of what goes into a file: the one that was given, or the file's stem.

    Raises:
        DirectionError: it cannot name a behaviour.
    """
    found = Path(out).stem if name is None else name
    return Direction(name=found, layer=None, values=np.ones((1, 1), np.float32), kind="vector", origin=out).name


def save_directions(
    path: str | Path,
    directions: Sequence[Direction],
    manifest: dict[str, Any],
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a direction file, complete or not at all.

    Args:
        path: of the safetensors file.
        directions: at least one; names and layers together are unique, layers are known, and all come from one
            model, tokenizer and chat template, and from the same tokens.
        manifest: further entries for the manifest: how the directions were made.
        tensors: what else to keep, by name; `read_tensors` gives it back.

    Raises:
        ConfigError: the file cannot be written.
    """
    from safetensors.numpy import save

    assert directions
    others = {name: np.ascontiguousarray(values) for name, values in (tensors or {}).items()}
    vectors: dict[str, np.ndarray] = {}
    for direction in directions:
        key = f"{direction.name}/{direction.layer}"
        assert direction.layer is not None and key not in vectors and key not in others, key
        # A fresh array: a view of a larger one would be saved with its parent's layout.
        vectors[key] = (direction.values if direction.kind == "bank" else direction.values[0]).copy()
    for name in _COMMON:
        assert len({getattr(direction, name) for direction in directions}) == 1, name
    complete = {
        "schema_version": SCHEMA_VERSION,
        **{name: getattr(directions[0], name) for name in _COMMON},
        "behaviors": sorted({direction.name for direction in directions}),
        "kinds": {direction.name: direction.kind for direction in directions},
        **({"tensors": sorted(others)} if others else {}),
        **manifest,
    }
    # As it will be read: JSON has text for keys, which sort otherwise than numbers.
    complete = json.loads(json.dumps(complete))
    complete["checksum"] = _checksum(complete, {**vectors, **others})
    with replacing(path) as temporary:
        # save_file would make the file readable for its owner alone.
        temporary.write_bytes(
            save({**vectors, **others}, metadata={METADATA_KEY: json.dumps(complete, sort_keys=True)})
        )


def load_directions(
    path: str | Path,
    *,
    layer: int | None = None,
    width: int | None = None,
    model_fingerprint: str | None = None,
    tokenizer_fingerprint: str | None = None,
    note: bool = True,
) -> list[Direction]:
    """Read a direction file, or a plain array made elsewhere.

    Args:
        path: a direction file, another `.safetensors`, or a `.npy` with [D] (vector) or [K, D] (bank). A plain array
            is named after its file; a tensor of a plain safetensors after itself (a final `/20` is its layer), or
            after the file when it is the only one.
        layer: only this layer; plain arrays without a layer are taken to belong to it.
        width: D that is needed.
        model_fingerprint: of the model that is needed; not compared for plain arrays, which do not say.
        tokenizer_fingerprint: of the tokenizer that is needed; likewise.
        note: log which of them do not say what they come from; False where they are read again.

    Returns:
        The directions, by name and layer.

    Raises:
        DirectionError: unreadable or unknown file, wrong width, NaN, zero, or made from another model
            or with another tokenizer.
        LayerError: the file does not hold the layer.
    """
    path = Path(path)
    if path.suffix == ".npy":
        found = [_plain(path, path.stem, layer, _read_npy(path))]
    elif path.suffix == ".safetensors":
        found = _read_safetensors(path, layer)
    else:
        raise DirectionError(f"{path}: unknown file type {path.suffix!r}; expected .safetensors or .npy")
    layers = sorted({direction.layer for direction in found if direction.layer is not None})
    kept = [direction for direction in found if layer is None or direction.layer == layer]
    absent = {direction.name for direction in found} - {direction.name for direction in kept}
    if absent:
        raise LayerError(
            f"{path} holds no layer {layer} for {', '.join(sorted(absent))}; its layers are {layers}; choose one of "
            "them, or build the behaviour again with this layer"
        )
    for direction in kept:
        if note and direction.model_fingerprint is None:
            logger.info(
                "%s: %s %r was made elsewhere: which model and tokens it came from is not known",
                path, direction.kind, direction.name,
            )  # fmt: skip
        actual = direction.values.shape[1]
        if width is not None and actual != width:
            raise DirectionError(f"{path}: direction {direction.name!r} has width {actual}; expected {width}")
        for what, made_from, needed in (
            ("model", direction.model_fingerprint, model_fingerprint),
            ("tokenizer", direction.tokenizer_fingerprint, tokenizer_fingerprint),
        ):
            if made_from and needed and made_from != needed:
                raise DirectionError(
                    f"{path}: direction {direction.name!r} was made from the {what} with fingerprint {made_from}, but "
                    f"the store from {needed}; build the behaviour with --base set to the store's model"
                )
    return sorted(kept, key=lambda direction: (direction.name, -1 if direction.layer is None else direction.layer))


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a direction file; {} for a plain safetensors file.

    Raises:
        DirectionError: the file or its manifest cannot be read.
    """
    return _manifest(Path(path), *_open_safetensors(Path(path)))


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a direction file that are no directions, by name; {} where there are none.

    Raises:
        DirectionError: the file or its manifest cannot be read, or it lacks a tensor that the manifest names.
    """
    tensors, metadata = _open_safetensors(Path(path))
    names = _manifest(Path(path), tensors, metadata).get("tensors", [])
    missing = [name for name in names if name not in tensors]
    if missing:
        raise DirectionError(f"{path} is damaged: its manifest names the tensor {missing[0]!r}, which is not there")
    return {name: tensors[name] for name in names}


def _plain(path: Path, name: str, layer: int | None, values: np.ndarray) -> Direction:
    if values.ndim not in (1, 2) or values.dtype.kind not in "fiu":
        raise DirectionError(
            f"{path}: {name!r} has shape {list(values.shape)} and type {values.dtype}; expected numbers of shape [D] "
            "or [K, D]"
        )
    kind: Kind = "vector" if values.ndim == 1 else "bank"
    with np.errstate(over="ignore"):
        rows = np.atleast_2d(values).astype(np.float32)
    return Direction(name=name, layer=layer, values=rows, kind=kind, origin=str(path))


def _read_npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            # Not numpy.load, which also opens archives of several arrays.
            values: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DirectionError(f"cannot read {path} as one array written by numpy.save: {error}") from error
    return values


def _open_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors (bfloat16 widened to float32) and metadata."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 - not a mapping
                dtype = file.get_slice(key).get_dtype()
                if dtype not in _TENSOR_TYPES:
                    raise DirectionError(
                        f"{path}: tensor {key!r} has type {dtype}; expected float32, float16 or bfloat16"
                    )
                if dtype == "BF16":
                    with safe_open(path, framework="pt") as wide:
                        tensors[key] = wide.get_tensor(key).float().numpy()
                else:
                    tensors[key] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise DirectionError(f"cannot read {path}: {error}") from error
    if not tensors:
        raise DirectionError(f"{path} holds no tensors")
    return tensors, metadata


def _checksum(manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over what a manifest says and the values that it describes."""
    said = {name: value for name, value in manifest.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"\n{name} {values.dtype} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _manifest(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise DirectionError(f"{path}: the manifest is not valid JSON: {error}") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise DirectionError(f"{path} has schema version {version!r}; expected {SCHEMA_VERSION}")
    assert isinstance(manifest, dict)
    if not isinstance(manifest.get("kinds"), dict):
        raise DirectionError(f"{path}: the manifest is damaged: kinds is {manifest.get('kinds')!r}")
    others = manifest.get("tensors", [])
    if not isinstance(others, list) or not all(isinstance(name, str) for name in others):
        raise DirectionError(f"{path}: the manifest is damaged: tensors is {others!r}")
    checksum = manifest.get("checksum")  # files of former versions have none
    if checksum is not None and checksum != (actual := _checksum(manifest, tensors)):
        raise DirectionError(
            f"{path} is damaged: its values have the checksum {actual[:16]}, but {str(checksum)[:16]} was written; "
            "make it again"
        )
    return manifest


def _read_safetensors(path: Path, layer: int | None) -> list[Direction]:
    tensors, metadata = _open_safetensors(path)
    manifest = _manifest(path, tensors, metadata)
    found = []
    others = frozenset(manifest.get("tensors", []))
    for key, values in tensors.items():
        if key in others:
            continue
        name, separator, number = key.rpartition("/")
        has_layer = bool(separator) and number.isdecimal()
        if not manifest:
            plain_name = name if has_layer else path.stem if len(tensors) == 1 else key
            found.append(_plain(path, plain_name, int(number) if has_layer else layer, values))
            continue
        kind = manifest["kinds"].get(name)
        if not has_layer or (kind, values.ndim) not in (("vector", 1), ("bank", 2)) or values.dtype != np.float32:
            raise DirectionError(
                f"{path}: tensor {key!r} has shape {list(values.shape)} and type {values.dtype}, but its manifest "
                f"calls it {kind!r}; expected float32 [D] for a vector, [K, D] for a bank, named behavior/layer"
            )
        found.append(
            Direction(
                name=name,
                layer=int(number),
                values=np.atleast_2d(values),
                kind=kind,
                origin=str(path),
                **{field: manifest.get(field) for field in _FINGERPRINTS},
                read_at=manifest.get("read_at", RESPONSES),
            )
        )
    return found
