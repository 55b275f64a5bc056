"""Reduced rows, kept beside the product: clustering them otherwise needs no other pass over the store.

Letters: n rows, D width, r reduced width.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.atomic import replacing
from pairtrace.engine.discovery.reduction import Reduction
from pairtrace.kernels.checksum import crc32c

logger = logging.getLogger(__name__)

REDUCED_FILE = "reduced.safetensors"
SCHEMA_VERSION = 1
_KEY = "pairtrace"


@dataclass(frozen=True, kw_only=True, eq=False)
class Reduced:
    """Rows of a store that have a direction, reduced.

    Attributes:
        rows: int64 [n], ascending, of the store.
        points: float32 [n, r], unit rows.
        kept: float32 [n], norm of a row that the reduction has kept.
        reduction: from the rows to the points.
    """

    rows: np.ndarray
    points: np.ndarray
    kept: np.ndarray
    reduction: Reduction


def write_reduced(path: Path, reduced: Reduced, made_from: Mapping[str, Any]) -> None:
    """Write the file, in place of one that is there.

    Args:
        path: of the file.
        reduced: what to keep.
        made_from: plain JSON values that decide the points.

    Raises:
        ConfigError: it cannot be written.
    """
    from safetensors.numpy import save_file

    tensors = {
        "rows": reduced.rows,
        "points": reduced.points,
        "kept": reduced.kept,
        "components": reduced.reduction.components,
        "share": reduced.reduction.share,
    }
    # Safetensors writes the memory of an array, whatever its strides.
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    content = {
        "schema_version": SCHEMA_VERSION,
        "made_from": dict(made_from),
        "mean_cosine": reduced.reduction.mean_cosine,
        "checksums": _checksums(tensors),
    }
    with replacing(path) as temporary:
        temporary.touch()
        usual = temporary.stat().st_mode
        save_file(tensors, temporary, {_KEY: json.dumps(content)})
        temporary.chmod(usual)  # not its owner's alone


def read_reduced(path: Path, made_from: Mapping[str, Any]) -> Reduced | None:
    """The file, if it was made from the same; None where there is none, it was made from something else or is damaged.

    Args:
        path: of the file.
        made_from: as for `write_reduced`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            content = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            if (content.get("schema_version"), content.get("made_from")) != (SCHEMA_VERSION, dict(made_from)):
                logger.info("%s was made from other rows or settings; the store is read again", path)
                return None
            tensors = {name: file.get_tensor(name) for name in content["checksums"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning("%s cannot be read (%s); the store is read again", path, error)
        return None
    if _checksums(tensors) != content["checksums"]:
        logger.warning("%s is damaged; the store is read again", path)
        return None
    return Reduced(
        rows=tensors["rows"],
        points=tensors["points"],
        kept=tensors["kept"],
        reduction=Reduction(
            components=tensors["components"], share=tensors["share"], mean_cosine=content["mean_cosine"]
        ),
    )


def _checksums(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: crc32c(values.reshape(-1).view(np.uint8)) for name, values in tensors.items()}
