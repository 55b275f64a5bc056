"""CRC-32C of large buffers at the speed of the memory: `crc32c`.

The store's chunks end with a CRC-32C (RFC 3720, B.4; the `crc32c` codec of Zarr). The processor's instruction for it
has a latency of three cycles but starts one every cycle, so that three interleaved streams per thread are needed to
keep it busy; several threads take a piece each. The remainders of the parts are put together by arithmetic in GF(2)[x]
modulo the polynomial, as in zlib's `crc32_combine`.
"""

from __future__ import annotations

import logging

import numpy as np

from pairtrace.errors import ConfigError

logger = logging.getLogger(__name__)

# Below this size the call of a compiled kernel costs more than it saves.
SMALL_BYTES = 1 << 16

_reported: set[str] = set()


def check_bytes(data: np.ndarray) -> None:
    """Raise ConfigError unless `data` is a contiguous uint8 array [bytes]."""
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        raise ConfigError(
            "a checksum needs contiguous uint8 [bytes], not "
            f"{data.dtype} {data.shape}{'' if data.flags.c_contiguous else ' with strides'}"
        )


def crc32c(data: np.ndarray, value: int = 0) -> int:
    """CRC-32C of bytes, or of bytes that follow others whose CRC-32C is known.

    Large buffers are divided among threads, with Python's lock released.

    Args:
        data: uint8 [bytes], contiguous; any alignment, read-only and memory-mapped arrays included.
        value: CRC-32C of the bytes before `data`, for a checksum in several calls.

    Raises:
        ConfigError: `data` is not a contiguous uint8 array, or `value` is no checksum.
    """
    check_bytes(data)
    if not 0 <= value < 1 << 32:
        raise ConfigError(f"a CRC-32C is between 0 and 2**32 - 1, not {value}")
    if len(data) >= SMALL_BYTES:
        from pairtrace.kernels import checksum_numba

        if checksum_numba.instruction_available():
            # A memory map is typed by its class; one compiled kernel serves all.
            return checksum_numba.crc32c_parallel(data.view(np.ndarray), value)
        if "instruction" not in _reported:
            _reported.add("instruction")
            logger.info("checksums go by google_crc32c: this processor has no CRC-32C instruction that Numba knows")
    import google_crc32c

    return int(google_crc32c.extend(value, data))
