"""The parallel CRC-32C against google_crc32c and published check values."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.errors import ConfigError
from pairtrace.kernels import checksum, checksum_numba
from pairtrace.kernels.checksum import crc32c

needs_instruction = pytest.mark.skipif(
    not checksum_numba.instruction_available(), reason="this processor has no CRC-32C instruction that Numba knows"
)


def _bytes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


@needs_instruction
@given(
    length=st.one_of(st.integers(0, 200), st.integers(0, 5000)),
    start=st.integers(0, 17),
    value=st.integers(0, 2**32 - 1),
    piece=st.sampled_from([24, 48, 240, 3 << 16]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=300)
def test_equals_google_crc32c_for_any_length_alignment_and_start_value(
    length: int, start: int, value: int, piece: int, seed: int
) -> None:
    data = _bytes(start + length, seed)[start:]
    with patch.object(checksum, "SMALL_BYTES", 0), patch.object(checksum_numba, "PIECE_BYTES", piece):
        assert crc32c(data, value) == google_crc32c.extend(value, data.tobytes())


@pytest.mark.parametrize(
    "length",
    [checksum.SMALL_BYTES - 1, checksum.SMALL_BYTES, checksum_numba.PIECE_BYTES * 17, 4_000_037],
)
def test_equals_google_crc32c_for_large_buffers(length: int) -> None:
    data = _bytes(length + 3)[3:]
    assert crc32c(data, 77) == google_crc32c.extend(77, data.tobytes())


@needs_instruction
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_published_values(message: bytes, expected: int) -> None:
    """RFC 3720, B.4, and the check value of the catalogue of CRC algorithms."""
    data = np.frombuffer(message, np.uint8)
    with patch.object(checksum, "SMALL_BYTES", 0):
        assert crc32c(data) == expected


@given(cuts=st.lists(st.integers(0, 400_000), max_size=4))
@settings(deadline=None, max_examples=20)
def test_a_checksum_may_be_taken_in_several_calls(cuts: list[int]) -> None:
    data = _bytes(400_000)
    edges = [0, *sorted(cuts), len(data)]
    value = 0
    for start, stop in itertools.pairwise(edges):
        value = crc32c(data[start:stop], value)
    assert value == crc32c(data)


def test_memory_maps_and_read_only_arrays(tmp_path: Path) -> None:
    data = _bytes(100_000)
    expected = google_crc32c.value(data.tobytes())
    data.tofile(tmp_path / "bytes")
    assert crc32c(np.memmap(tmp_path / "bytes", np.uint8, "r")) == expected
    data.flags.writeable = False
    assert crc32c(data) == expected
    assert not data.flags.writeable


def test_the_callers_array_stays_writable() -> None:
    data = _bytes(100_000)
    crc32c(data)
    data[0] = 1


def test_every_flipped_bit_changes_it() -> None:
    data = _bytes(300_000)
    expected = crc32c(data)
    for place in np.random.default_rng(1).integers(0, 8 * len(data), 40):
        data[place // 8] ^= 1 << (place % 8)
        assert crc32c(data) != expected
        data[place // 8] ^= 1 << (place % 8)


def test_without_the_instruction_the_library_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("the instruction is not there")

    monkeypatch.setattr(checksum_numba, "instruction_available", lambda: False)
    monkeypatch.setattr(checksum_numba, "crc32c_parallel", refuse)
    data = _bytes(100_000)
    assert crc32c(data, 5) == google_crc32c.extend(5, data.tobytes())


@pytest.mark.parametrize(
    ("machine", "features", "chosen", "expected"),
    [
        ("x86_64", {"crc32": True}, None, True),
        ("x86_64", {"crc32": False}, None, False),
        ("x86_64", {"crc32": True}, "", False),
        ("x86_64", {"crc32": True}, "+crc32,+avx", True),
        ("aarch64", {"crc": True}, None, True),
        ("aarch64", {}, None, False),
        ("riscv64", {"crc": True}, None, False),
    ],
)
def test_the_instruction_is_used_only_where_the_compiler_may_emit_it(
    machine: str,
    features: dict[str, bool],
    chosen: str | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda: features)
    monkeypatch.setattr("numba.config.CPU_FEATURES", chosen)
    assert checksum_numba.instruction_available.__wrapped__() is expected


def test_the_instruction_of_the_other_processor_compiles() -> None:
    """The intrinsic for 64-bit ARM, through LLVM's own compiler: a wrong name would come out as a call."""
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    for machine, processor, instruction in (("aarch64", "generic", "crc32cx"), ("x86_64", "x86-64", "crc32q")):
        triple = f"{machine}-unknown-linux-gnu"
        feature, name, bits = checksum_numba._INSTRUCTIONS[machine]
        source = (
            f'target triple = "{triple}"\ndeclare i{bits} @{name}(i{bits}, i64)\n'
            f"define i{bits} @f(i{bits} %s, i64 %v) {{\n"
            f"  %r = call i{bits} @{name}(i{bits} %s, i64 %v)\n  ret i{bits} %r\n}}"
        )
        target = binding.Target.from_triple(triple).create_target_machine(cpu=processor, features=f"+{feature}")
        assert instruction in target.emit_assembly(binding.parse_assembly(source))


@pytest.mark.parametrize(
    "data", [np.zeros(4, np.int8), np.zeros((2, 2), np.uint8), np.zeros(8, np.uint8)[::2], np.zeros(2, np.float32)]
)
def test_other_arrays_are_refused(data: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="contiguous uint8"):
        crc32c(data)


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_values_that_are_no_checksum_are_refused(value: int) -> None:
    with pytest.raises(ConfigError, match="between 0 and"):
        crc32c(np.zeros(4, np.uint8), value)


# Silent mistakes that a check against the library must catch: each takes the right checksum, or the bytes, and spoils
# them.
MUTATIONS: dict[str, Callable[[np.ndarray, int], int]] = {
    "start value ignored": lambda data, value: crc32c(data),
    "last bytes left out": lambda data, value: crc32c(data[:-1], value),
    "last bytes as zeros": lambda data, value: crc32c(np.concatenate([data[:-5], np.zeros(5, np.uint8)]), value),
    "pieces in another order": lambda data, value: crc32c(np.roll(data, checksum_numba.PIECE_BYTES), value),
    "streams put together without a shift": lambda data, value: crc32c(data[:100_000], value) ^ crc32c(data[100_000:]),
    "polynomial of zlib": lambda data, value: zlib.crc32(data.tobytes(), value),
    "words in another byte order": lambda data, value: crc32c(
        data[: len(data) // 8 * 8].view(np.uint64).byteswap().view(np.uint8), value
    ),
}


@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_mutations_are_caught(mutation: str) -> None:
    data = _bytes(1_000_003)
    expected = google_crc32c.extend(9, data.tobytes())
    assert crc32c(data, 9) == expected
    assert MUTATIONS[mutation](data, 9) != expected
