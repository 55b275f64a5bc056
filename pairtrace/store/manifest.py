"""The manifest: what a store was made from, kept in the group attribute "pairtrace".

Importing this module costs nothing but the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pairtrace.errors import ConfigError, StoreDamagedError, StoreMismatchError, StoreSchemaError
from pairtrace.store.codecs import NONE, parse_codec

SCHEMA_VERSION = 2
READABLE = (1, 2)
ATTRIBUTE = "pairtrace"

DTYPES = ("float16", "float32", "bfloat16", "int8")
TRUNCATIONS = ("keep_start", "keep_end")

# Compared in this order, so that the first difference named is the most telling one.
IDENTITY = (
    "model_fingerprint",
    "tokenizer_fingerprint",
    "template_fingerprint",
    "data_fingerprint",
    "max_length",
    "truncation",
    "pooling",
    "dtype",
    "converted_from",
    "codec",
    "compute_dtype",
    "backend",
    "layers",
    "sides",
    "rows",
    "limit",
    "width",
)

# What schema 1 did not have, and what its stores are in these respects.
_SINCE_2: dict[str, Any] = {
    "codec": NONE,
    "split": None,
    "chat_template": None,
    "template_date": None,
    "converted_from": None,
    "source_store": None,
}
# Only in the manifests that need them: others are as their older readers know them.
_OPTIONAL: dict[str, Any] = {"source_store": None, "backend": "hf"}
_SOURCE_FIELDS = frozenset(("path", "dtype", "codec"))

_ADVICE = "choose another path for the store of this run, or repeat the settings that the store was made with"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that decides the values in a store, and where they came from.

    `created`, `versions`, `data`, `data_format`, `columns`, `split`, `chat_template`, `template_date`, `model`,
    `source_store`, `attention` and `shard_rows` describe the store but are not part of its identity: a resumed run
    keeps the store's own. (The split and the template are in the fingerprints.)

    Attributes:
        schema_version: version of the on-disk layout: 2, or 1 for a store without codec and int8, whose manifest
            lacks the fields that came with them.
        rows: N, rows of the data set, quarantined ones included.
        width: D, width of the residual stream.
        layers: numbers of the layers kept (blocks passed; 0 is the embedding output), ascending.
        dtype: element type of diff, chosen and rejected: "float16", "float32", "bfloat16" (stored as its uint16
            bits) or "int8" (scaled by row and by column of each shard).
        codec: compression of diff, chosen and rejected: "none", or NAME:LEVEL (see `parse_codec`).
        converted_from: dtype of the store that this one's rows were rounded from, after several conversions the
            coarsest on the way; None for rows rounded from the model's own output. A conversion that changes only the
            codec leaves it as it is.
        source_store: of a converted store "path" (absolute), "dtype" and "codec" of the store that was converted; None
            for an extracted one, and for a store that was converted before this was recorded.
        sides: whether chosen and rejected are kept beside their difference.
        shard_rows: S, rows per shard. The last chunk of each array is padded to S rows on disk.
        compute_dtype: element type of the forward pass.
        backend: what ran the model: "hf" (transformers), or "vllm", whose values differ from those in the last bits of
            the compute dtype.
        model: path (absolute) or hub id of the checkpoint.
        model_fingerprint: sha256 (hex) of the weights and configuration.
        tokenizer_fingerprint: sha256 (hex) of the tokenizer.
        template_fingerprint: sha256 (hex) of the chat template.
        data_fingerprint: sha256 (hex) of the data and the column mapping.
        data: path or id of the data as it was given.
        data_format: recognised format of the data.
        columns: column names used for prompt, chosen, rejected and source (None: not there).
        split: split of a data set that has several, as it was given.
        chat_template: file with the chat template, as it was given; None for the tokenizer's own.
        template_date: day (YYYY-MM-DD) given to a chat template that prints the date.
        max_length: longest sequence in tokens, None for no limit.
        truncation: which end of a long sequence is kept.
        pooling: which tokens a row is the mean of.
        attention: how attention was computed, free text.
        limit: rows asked for with --limit, None for all.
        created: ISO 8601 time (UTC) of creation.
        versions: versions of pairtrace and the libraries that decide the values.
    """

    schema_version: int = SCHEMA_VERSION
    rows: int
    width: int
    layers: tuple[int, ...]
    dtype: str = "float16"
    codec: str = NONE
    converted_from: str | None = None
    source_store: dict[str, str] | None = None
    sides: bool = False
    shard_rows: int
    compute_dtype: str
    backend: str = "hf"
    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    data_fingerprint: str
    data: str
    data_format: str
    columns: dict[str, str | None] = field(default_factory=dict)
    split: str | None = None
    chat_template: str | None = None
    template_date: str | None = None
    max_length: int | None
    truncation: str
    pooling: str = "mean-of-loss-tokens"
    attention: str = ""
    limit: int | None = None
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("rows", "width", "shard_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ConfigError(f"layers must be distinct, ascending and not negative, not {list(self.layers)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.truncation not in TRUNCATIONS:
            raise ConfigError(f"truncation must be one of {', '.join(TRUNCATIONS)}, not {self.truncation!r}")
        if self.converted_from not in (None, *DTYPES):
            raise ConfigError(f"converted_from must be one of {', '.join(DTYPES)}, not {self.converted_from!r}")
        parse_codec(self.codec)
        if self.schema_version not in READABLE:
            raise ConfigError(f"schema_version must be one of {_listed(READABLE)}, not {self.schema_version!r}")
        if self.schema_version == 1:
            newer = [name for name, old in _SINCE_2.items() if getattr(self, name) != old]
            if newer or self.dtype == "int8":
                raise ConfigError(f"schema_version 1 has no {newer[0] if newer else 'dtype int8'}")

    @property
    def converted(self) -> bool:
        """Whether the rows were converted from another store."""
        return self.converted_from is not None or self.source_store is not None

    def require_same(self, expected: Manifest) -> None:
        """Check that this store holds what a run with the manifest `expected` would compute.

        Raises:
            StoreMismatchError: for the first field of the identity that differs.
        """
        self.require_fields({name: getattr(expected, name) for name in IDENTITY})

    def require_fields(self, expected: Mapping[str, Any]) -> None:
        """`require_same` for some fields of the identity.

        Raises:
            StoreMismatchError: for the first one that differs.
        """
        for name in IDENTITY:
            if name in expected and getattr(self, name) != expected[name]:
                raise StoreMismatchError(name, expected[name], getattr(self, name), _ADVICE)

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object (tuples become lists)."""
        absent = _SINCE_2 if self.schema_version == 1 else {}
        values = {**asdict(self), "layers": list(self.layers)}
        unused = {name for name, usual in _OPTIONAL.items() if values[name] == usual}
        return {name: value for name, value in values.items() if name not in absent and name not in unused}

    @classmethod
    def from_json(cls, value: object, where: str) -> Manifest:
        """Read back what `to_json` gave.

        Args:
            value: the decoded JSON.
            where: the store's path, for messages.

        Raises:
            StoreSchemaError: the store has another schema version.
            StoreDamagedError: a field is missing, unknown or of the wrong type.
        """
        if not isinstance(value, dict):
            raise StoreDamagedError(f"{where}: the manifest is not a JSON object but {type(value).__name__}")
        version = value.get("schema_version")
        if type(version) is not int or version not in READABLE:
            raise StoreSchemaError(
                f"{where} has schema version {version!r}; this pairtrace reads versions {_listed(READABLE)}. "
                "Install the pairtrace release that wrote it, or extract into a new store"
            )
        names = {f.name for f in fields(cls)} - (set(_SINCE_2) if version == 1 else set())
        missing, unknown = sorted(names - set(_OPTIONAL) - set(value)), sorted(set(value) - names)
        if missing or unknown:
            raise StoreDamagedError(
                f"{where}: the manifest is damaged (missing fields {missing}, unknown fields {unknown})"
            )
        for name, kinds in _KINDS.items():
            if name not in value:
                continue
            item = value[name]
            # bool is a subclass of int, but True is no number of rows.
            if not isinstance(item, kinds) or (isinstance(item, bool) and bool not in kinds):
                raise StoreDamagedError(f"{where}: the manifest is damaged ({name} is {json.dumps(item)})")
        if not all(type(layer) is int for layer in value["layers"]):
            raise StoreDamagedError(f"{where}: the manifest is damaged (layers is {value['layers']})")
        source = value.get("source_store")
        if source is not None and (
            set(source) != _SOURCE_FIELDS or not all(type(item) is str for item in source.values())
        ):
            raise StoreDamagedError(f"{where}: the manifest is damaged (source_store is {json.dumps(source)})")
        try:
            return cls(**{**value, "layers": tuple(value["layers"])})
        except ConfigError as error:
            raise StoreDamagedError(f"{where}: the manifest is damaged ({error})") from error


def _listed(versions: tuple[int, ...]) -> str:
    return " and ".join(map(str, versions))


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("rows", "width", "shard_rows"), (int,)),
    **dict.fromkeys(("max_length", "limit"), (int, type(None))),
    **dict.fromkeys(
        (
            "dtype",
            "compute_dtype",
            "model",
            "model_fingerprint",
            "tokenizer_fingerprint",
            "template_fingerprint",
            "data_fingerprint",
            "data",
            "data_format",
            "truncation",
            "pooling",
            "attention",
            "created",
            "codec",
            "backend",
        ),
        (str,),
    ),
    **dict.fromkeys(("split", "chat_template", "template_date", "converted_from"), (str, type(None))),
    **dict.fromkeys(("columns", "versions"), (dict,)),
    "source_store": (dict, type(None)),
    "layers": (list,),
    "sides": (bool,),
}
