"""Compression of the row arrays: which codecs exist, what Zarr calls them, and their bytes.

A compressed chunk is what Zarr's codecs bytes -> compressor -> crc32c write. Importing this module costs nothing but
the standard library.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pairtrace.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

NONE = "none"

# Levels of each compressor, first and last.
LEVELS = {"zstd": (1, 22), "blosc-lz4": (1, 9), "blosc-zstd": (1, 9)}

# Blosc counts bytes in 31 bits and adds a header.
_LARGEST_BLOSC = 2**31 - 1 - 16


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One compressor.

    Attributes:
        name: "zstd", "blosc-lz4" or "blosc-zstd"; the blosc ones shuffle bits before they compress.
        level: of compression, within `LEVELS`.
    """

    name: str
    level: int

    def metadata(self, item_bytes: int) -> dict[str, Any]:
        """How `zarr.json` describes it.

        Args:
            item_bytes: size of one element of the array.
        """
        if self.name == "zstd":
            return {"name": "zstd", "configuration": {"level": self.level, "checksum": False}}
        return {
            "name": "blosc",
            "configuration": {
                "typesize": item_bytes,
                "cname": self.name.removeprefix("blosc-"),
                "clevel": self.level,
                "shuffle": "bitshuffle",
                "blocksize": 0,
            },
        }

    def encode(self, raw: npt.NDArray[np.uint8], item_bytes: int) -> npt.NDArray[np.uint8]:
        """Compress the bytes of a chunk. The same bytes give the same result, except on the main thread.

        There blosc uses threads of its own, which order their blocks as they happen to finish.

        Args:
            raw: uint8, contiguous.
            item_bytes: size of one element of the array.

        Raises:
            ConfigError: the chunk is larger than the compressor can take.
        """
        import numpy as np

        if self.name != "zstd" and raw.nbytes > _LARGEST_BLOSC:
            raise ConfigError(
                f"a chunk of {raw.nbytes:,} bytes is more than {self.name} can take ({_LARGEST_BLOSC:,}); use zstd, "
                "or fewer rows per shard (--shard-rows)"
            )
        return np.frombuffer(self._compressor(item_bytes).encode(raw), np.uint8)

    def decode(self, body: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
        """Decompress the bytes of a chunk, whose checksum has been compared before.

        Args:
            body: what `encode` gave.
            size: bytes of the chunk before compression.

        Raises:
            ValueError: these are not the bytes of such a chunk.
        """
        import numpy as np

        if self.name != "zstd":
            _check_blosc_header(body, size)
        try:
            raw = np.frombuffer(self._compressor(1).decode(body), np.uint8)
        except RuntimeError as error:
            raise ValueError(f"its chunk cannot be decompressed ({error})") from error
        if raw.nbytes != size:
            raise ValueError(f"its chunk decompresses to {raw.nbytes} bytes instead of {size}")
        return raw

    def _compressor(self, item_bytes: int) -> Any:
        if self.name == "zstd":
            from numcodecs.zstd import Zstd

            return Zstd(level=self.level, checksum=False)
        from numcodecs.blosc import BITSHUFFLE, Blosc

        cname = self.name.removeprefix("blosc-")
        return Blosc(cname=cname, clevel=self.level, shuffle=BITSHUFFLE, blocksize=0, typesize=item_bytes)


def _check_blosc_header(body: npt.NDArray[np.uint8], size: int) -> None:
    """Blosc believes its header and would read past the end of a chunk that is shorter than that says."""
    header = struct.Struct("<4xI4xI")
    if len(body) < header.size:
        raise ValueError(f"its chunk cannot be decompressed (it has only {len(body)} bytes)")
    whole, packed = header.unpack(body[: header.size].tobytes())
    if packed != len(body):
        raise ValueError(f"its chunk cannot be decompressed (it has {len(body)} bytes instead of {packed})")
    if whole != size:
        raise ValueError(f"its chunk decompresses to {whole} bytes instead of {size}")


def parse_codec(text: str) -> Codec | None:
    """The codec of a manifest or of `--codec`: "none", or NAME:LEVEL.

    Returns:
        The compressor; None for "none".

    Raises:
        ConfigError: no such codec or level; the message lists what exists.
    """
    if text == NONE:
        return None
    name, _, level = text.partition(":")
    if name in LEVELS and level.isascii() and level.isdigit():
        lowest, highest = LEVELS[name]
        # Only one spelling: two stores with the same bytes must not differ in their manifests.
        if lowest <= int(level) <= highest and str(int(level)) == level:
            return Codec(name=name, level=int(level))
    known = ", ".join(f"{one}:{lowest} to {one}:{highest}" for one, (lowest, highest) in LEVELS.items())
    raise ConfigError(f"unknown codec {text!r}; expected {NONE}, {known}")
