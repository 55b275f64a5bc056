"""Safetensors files as bytes: their headers, and the same tensors in fewer.

A file is the length of its header (8 bytes, little endian), the header (JSON: name to dtype, shape and offsets of the
bytes behind the header) and the bytes of the tensors without gaps.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairtrace.errors import ModelError

_METADATA = "__metadata__"
# As the format's own library: a longer header is damage, not a model.
_LONGEST_HEADER = 100_000_000
_COPIED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        tensors: name to {"dtype", "shape", "data_offsets"}; offsets count from `data`.
        metadata: free text of the writer.
        data: position in the file at which the bytes of the tensors begin.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    data: int


def read_header(file: Path) -> Header:
    """Read and check the header of a file; no tensor is read.

    Raises:
        ModelError: the header is damaged, or the file is shorter or longer than it says.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            content = json.loads(stream.read(length)) if length <= _LONGEST_HEADER else None
        if not isinstance(content, dict):
            raise TypeError(f"{length:,} bytes that are no JSON object")
        metadata = content.pop(_METADATA, {})
        end = max((entry["data_offsets"][1] for entry in content.values()), default=0)
    except (OSError, struct.error, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(f"{file} is damaged: its header cannot be read ({error})") from error
    size, needed = file.stat().st_size, 8 + length + end
    if size != needed:
        raise ModelError(f"{file} is damaged or half written: it has {size:,} bytes, its header says {needed:,}")
    return Header(content, metadata, 8 + length)


def kept_tensors(header: Header, stays: Callable[[str], bool]) -> list[str]:
    """The names for which `stays` holds, in the order of their bytes."""
    return sorted(filter(stays, header.tensors), key=lambda name: header.tensors[name]["data_offsets"][0])


def write_subset(file: Path, header: Header, names: Sequence[str], target: Path) -> None:
    """Write some tensors of a file, bit by bit the same, to another file, and force it to the disk.

    Args:
        file: to read.
        header: of `file`.
        names: tensors to keep, in the order that they get.
        target: to write.
    """
    entries: dict[str, Any] = {_METADATA: header.metadata} if header.metadata else {}
    place = 0
    for name in names:
        begin, end = header.tensors[name]["data_offsets"]
        entries[name] = {**header.tensors[name], "data_offsets": [place, place + end - begin]}
        place += end - begin
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes of the tensors stay aligned
    with file.open("rb") as source, target.open("wb") as written:
        written.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            begin, end = header.tensors[name]["data_offsets"]
            source.seek(header.data + begin)
            left = end - begin
            while left:
                block = source.read(min(left, _COPIED_AT_ONCE))
                if not block:
                    raise ModelError(f"{file} became shorter while it was read")
                written.write(block)
                left -= len(block)
        written.flush()
        os.fsync(written.fileno())
