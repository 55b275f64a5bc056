"""Reading bytes and doing nothing with them: the yardstick of every other read.

From memory: an integer sum over all words, in as many threads as everything else gets. From files: `readinto` a buffer
of one megabyte, used over and over. And what it takes to read from the disk instead of the page cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np

BUFFER_BYTES = 1 << 20


@numba.njit(parallel=True)
def sum_in_prange(words: np.ndarray) -> int:
    """Sum of int64 words, in Numba's threads."""
    total = np.int64(0)
    for place in numba.prange(words.size):
        total += words[place]
    return total


@numba.njit(nogil=True)
def sum_words(words: np.ndarray) -> int:
    """Sum of int64 words, without Python's lock."""
    total = np.int64(0)
    for place in range(words.size):
        total += words[place]
    return total


def as_words(array: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array as int64, up to seven at the end left out."""
    flat = array.reshape(-1).view(np.uint8)
    return flat[: flat.size // 8 * 8].view(np.int64)


def read_memory(array: np.ndarray, threads: int) -> dict[str, Callable[[], object]]:
    """Several ways to read an array once; the yardstick is the fastest."""
    words = as_words(array)
    parts = np.array_split(words, threads)
    pool = ThreadPoolExecutor(threads)
    return {
        "plain read (sum, Numba prange)": lambda: sum_in_prange(words),
        "plain read (sum, Numba in threads)": lambda: list(pool.map(sum_words, parts)),
        "plain read (maximum, NumPy in threads)": lambda: list(pool.map(np.max, parts)),
    }


def files_below(folder: Path) -> list[Path]:
    """Every file of a store, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_files(paths: Sequence[Path]) -> int:
    """Read files one after the other into one buffer; gives the number of bytes."""
    buffer, total = bytearray(BUFFER_BYTES), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def read_files_in_threads(paths: Sequence[Path], threads: int) -> int:
    """The same with every file read by one of several threads."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(read_files, [paths[number::threads] for number in range(threads)]))


def drop_from_cache(paths: Sequence[Path]) -> float:
    """Write files to the disk and take them out of the page cache.

    Returns:
        the share of their pages that is still there (0 when it worked, 1 in a file system that lives in memory).
    """
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return resident_share(paths)


def resident_share(paths: Sequence[Path]) -> float:
    """Share of the files' pages that are in the page cache."""
    resident = pages = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for path in paths:
        size = path.stat().st_size
        if size == 0:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
            count = -(-size // mmap.PAGESIZE)
            states = (ctypes.c_ubyte * count)()
            view = np.frombuffer(mapped, np.uint8)
            failed = libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), states)
            if failed:
                raise OSError(ctypes.get_errno(), f"mincore failed for {path}")
            resident += int((np.frombuffer(states, np.uint8) & 1).sum())
            pages += count
            del view
    return resident / pages if pages else 0.0
