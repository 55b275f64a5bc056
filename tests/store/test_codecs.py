from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pairtrace.engine.extract import ExtractConfig
from pairtrace.errors import ConfigError, StoreMismatchError
from pairtrace.store import codecs
from pairtrace.store.codecs import LEVELS, parse_codec
from pairtrace.store.reader import ActivationStore
from pairtrace.store.writer import StoreWriter
from tests.store.samples import make_manifest, tree_bytes, write_store

CODECS = ["zstd:1", "zstd:22", "blosc-lz4:1", "blosc-zstd:9"]


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("item_bytes", [1, 2, 4])
def test_round_trip(text: str, item_bytes: int) -> None:
    codec = parse_codec(text)
    assert codec is not None and f"{codec.name}:{codec.level}" == text
    rng = np.random.default_rng(0)
    for values in (np.zeros(1000, np.uint8), rng.integers(0, 256, 4096).astype(np.uint8)):
        packed = codec.encode(values, item_bytes)
        assert packed.dtype == np.uint8 and (values.any() or len(packed) < len(values))
        np.testing.assert_array_equal(codec.decode(packed, len(values)), values)


def test_none_is_no_codec() -> None:
    assert parse_codec("none") is None


@pytest.mark.parametrize(
    "text",
    ["", "zstd", "zstd:", "zstd:0", "zstd:23", "zstd:-1", "zstd:03", "zstd:x", "zstd:²", "blosc:3", "gzip:5", "None"],
)
def test_what_does_not_exist_is_refused_with_what_does(text: str) -> None:
    message = "expected none, zstd:1 to zstd:22, blosc-lz4:1 to blosc-lz4:9, blosc-zstd:1 to blosc-zstd:9"
    for use in (
        lambda: parse_codec(text),
        lambda: make_manifest(codec=text),
        lambda: ExtractConfig(data="d", model="m", layers=(1,), store="s", codec=text),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            use()
        assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", CODECS)
def test_bytes_that_are_no_chunk_are_refused(text: str) -> None:
    codec = parse_codec(text)
    assert codec is not None
    packed = codec.encode(np.arange(200, dtype=np.uint8), 2)
    with pytest.raises(ValueError, match="decompresses to 200 bytes instead of 199"):
        codec.decode(packed, 199)
    for harmed in (packed[:-7], packed[:3], packed[:0], np.frombuffer(b"what is this? " * 9, np.uint8)):
        with pytest.raises(ValueError, match=r"its chunk (cannot be decompressed|decompresses to)"):
            codec.decode(harmed, 200)


def test_a_chunk_too_large_for_blosc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "_LARGEST_BLOSC", 99)
    values = np.zeros(100, np.uint8)
    for name, (_, level) in LEVELS.items():
        codec = codecs.Codec(name=name, level=level)
        if name == "zstd":
            codec.encode(values, 2)
        else:
            with pytest.raises(ConfigError, match=f"100 bytes is more than {name} can take.*--shard-rows"):
                codec.encode(values, 2)


@pytest.mark.parametrize("text", CODECS)
def test_the_same_bytes_whatever_thread_compresses(text: str) -> None:
    """Resumed stores have equal bytes; on the main thread blosc orders its blocks by chance, so that is not used."""
    codec = parse_codec(text)
    assert codec is not None
    values = np.random.default_rng(0).normal(size=1 << 19).astype(np.float16).view(np.uint8)
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: codec.encode(values, 2).tobytes(), range(6)))
    assert len(set(made)) == 1


def test_the_writer_compresses_off_the_main_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    original = codecs.Codec.encode

    def logged(self: codecs.Codec, raw: np.ndarray, item_bytes: int) -> np.ndarray:
        threads.add(threading.current_thread())
        return original(self, raw, item_bytes)

    monkeypatch.setattr(codecs.Codec, "encode", logged)
    write_store(tmp_path, make_manifest(codec="blosc-lz4:5"))
    assert threads and threading.main_thread() not in threads


def test_only_the_rows_are_compressed(tmp_path: Path) -> None:
    for name, codec in (("plain", "none"), ("packed", "zstd:3")):
        write_store(tmp_path / name, make_manifest(codec=codec, width=512, dtype="int8", sides=True))
    plain, packed = tree_bytes(tmp_path / "plain"), tree_bytes(tmp_path / "packed")
    assert set(plain) == set(packed)
    different = {key for key in plain if "/c/" in key and plain[key] != packed[key]}
    assert different == {key for key in plain if "/c/" in key and key.startswith(("diff/", "chosen/", "rejected/"))}


def test_a_run_with_another_codec_does_not_resume(tmp_path: Path) -> None:
    write_store(tmp_path, make_manifest(codec="zstd:3"), [0])
    with pytest.raises(StoreMismatchError, match="codec is 'zstd:3', but 'zstd:4' is needed") as caught:
        StoreWriter.create_or_resume(tmp_path, make_manifest(codec="zstd:4"))
    assert caught.value.field == "codec"
    write_store(tmp_path, make_manifest(codec="zstd:3"))
    assert ActivationStore.open(tmp_path).rows == 10
