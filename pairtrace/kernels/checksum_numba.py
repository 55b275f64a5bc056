"""The CPU kernel behind `pairtrace.kernels.checksum`: imported only when it runs, because Numba is heavy.

A checksum's remainder is a polynomial of degree below 32 over GF(2), in reflected bits: bit 31 is the coefficient of
x**0. "State" is the remainder as the instruction knows it: without the inversions at the start and at the end.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from pairtrace.kernels.compiled import parallel, run

POLYNOMIAL = 0x82F63B78
# x**0 in reflected bits.
UNITY = 1 << 31
INVERTED = 0xFFFFFFFF

# Bytes of one task; a multiple of 3 * 8. Large enough to hide the combination, small enough to share evenly.
PIECE_BYTES = 3 << 16

# Of each machine: the feature that LLVM must see (sse4.2 alone is not enough), the intrinsic, bits of its state.
_INSTRUCTIONS = {
    "x86_64": ("crc32", "llvm.x86.sse42.crc32.64.64", 64),
    "AMD64": ("crc32", "llvm.x86.sse42.crc32.64.64", 64),
    "aarch64": ("crc", "llvm.aarch64.crc32cx", 32),
    "arm64": ("crc", "llvm.aarch64.crc32cx", 32),
}


@cache
def instruction_available() -> bool:
    """Whether code for this processor may use the instruction: LLVM ends the process where it cannot select it."""
    if platform.machine() not in _INSTRUCTIONS:
        return False
    feature = _INSTRUCTIONS[platform.machine()][0]
    settings: Any = numba.config  # its attributes are set at run time, from the environment
    if settings.CPU_FEATURES is not None:
        return f"+{feature}" in settings.CPU_FEATURES.split(",")
    return bool(binding.get_host_cpu_features().get(feature, False))


def _step_for(typingctx: Any, state: Any, data: Any, offset: Any) -> Any:
    """State after the eight bytes at `offset`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, name, bits = _INSTRUCTIONS[platform.machine()]
        state_type, word = ir.IntType(bits), ir.IntType(64)
        array = context.make_array(signature.args[1])(context, builder, args[1])
        address = builder.gep(builder.bitcast(array.data, cgutils.voidptr_t), [args[2]])
        value = builder.load(builder.bitcast(address, word.as_pointer()), align=1)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(state_type, [state_type, word]), name)
        if bits == 64:
            return builder.call(function, [args[0], value])
        return builder.zext(builder.call(function, [builder.trunc(args[0], state_type), value]), word)

    return types.uint64(types.uint64, data, types.int64), codegen


_step: Any = intrinsic(_step_for)


@numba.njit
def times(a: Any, b: Any) -> Any:
    """Product modulo the polynomial."""
    product = np.uint64(0)
    for bit in range(32):
        if a & (np.uint64(UNITY) >> np.uint64(bit)):
            product ^= b
        b = (b >> np.uint64(1)) ^ (np.uint64(POLYNOMIAL) if b & np.uint64(1) else np.uint64(0))
    return product


@numba.njit
def power_of_bytes(count: Any) -> Any:
    """x**(8 * count): what `count` bytes of zeros behind a message multiply its state by."""
    power = np.uint64(UNITY)
    square = np.uint64(UNITY >> 8)
    while count > 0:
        if count & 1:
            power = times(power, square)
        square = times(square, square)
        count >>= 1
    return power


@numba.njit
def _byte_wise(state: Any, data: Any, start: int, stop: int) -> Any:
    for i in range(start, stop):
        state ^= np.uint64(data[i])
        for _ in range(8):
            state = (state >> np.uint64(1)) ^ (np.uint64(POLYNOMIAL) if state & np.uint64(1) else np.uint64(0))
    return state


@numba.njit
def piece_state(data: Any, start: int, stop: int, state: Any, power: Any) -> Any:
    """State after the bytes [start, stop); `power` belongs to a third of their whole words."""
    third = (stop - start) // 24 * 8
    first, second, last = state, np.uint64(0), np.uint64(0)
    for offset in range(start, start + third, 8):
        first = _step(first, data, offset)
        second = _step(second, data, offset + third)
        last = _step(last, data, offset + 2 * third)
    state = times(power, times(power, first) ^ second) ^ last
    offset = start + 3 * third
    while offset + 8 <= stop:
        state = _step(state, data, offset)
        offset += 8
    return _byte_wise(state, data, offset, stop)


@numba.njit
def joined_states(state: Any, states: Any, piece: int) -> Any:
    """State after pieces of equal length that follow the bytes of `state`, from those of each piece alone."""
    power = power_of_bytes(piece)
    for i in range(states.shape[0]):
        state = times(power, state) ^ states[i]
    return state


@parallel
def _parallel_state(data: Any, state: Any, piece: int) -> Any:
    """State after all bytes: full pieces by all threads, then their states put together and the rest."""
    pieces = data.shape[0] // piece
    states = np.zeros(pieces, np.uint64)
    third_power = power_of_bytes(piece // 24 * 8)
    for i in prange(pieces):
        states[i] = piece_state(data, i * piece, (i + 1) * piece, np.uint64(0), third_power)
    state = joined_states(state, states, piece)
    rest = data.shape[0] - pieces * piece
    return piece_state(data, pieces * piece, data.shape[0], state, power_of_bytes(rest // 24 * 8))


def crc32c_parallel(data: np.ndarray, value: int) -> int:
    """CRC-32C of a contiguous uint8 array that follows bytes with the CRC-32C `value`."""
    # Read-only and writable arrays are types of their own to Numba: a read-only view compiles once.
    data = data.view()
    data.flags.writeable = False
    return int(run(_parallel_state, data, np.uint64(value ^ INVERTED), PIECE_BYTES)) ^ INVERTED
