from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pairtrace.engine.directions import Direction, load_directions, read_manifest, read_tensors, save_directions
from pairtrace.errors import ConfigError, DirectionError, LayerError
from tests.engine.small_store import any_values


def direction(name: str = "b", layer: int = 3, seed: int = 0, kind: Any = "vector", k: int = 1) -> Direction:
    return Direction(
        name=name,
        layer=layer,
        values=any_values(seed, k, 8),
        kind=kind,
        origin="test",
        model_fingerprint="a" * 64,
        tokenizer_fingerprint="k" * 64,
        template_fingerprint="t" * 64,
    )


def test_round_trip_keeps_every_bit_and_the_documented_layout(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    given = [direction(), direction(layer=4, seed=1), direction("b-bank", 3, 2, "bank", 5)]
    save_directions(path, given, {"created": "now"})
    loaded = load_directions(path)
    assert [(d.name, d.layer, d.kind) for d in loaded] == [
        ("b", 3, "vector"),
        ("b", 4, "vector"),
        ("b-bank", 3, "bank"),
    ]
    for before, after in zip(given, loaded, strict=True):
        assert np.array_equal(before.values, after.values)
        assert before.fingerprint == after.fingerprint
    # The bytes, read without pairtrace: length, JSON header, data.
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert header["b/3"]["shape"] == [8]
    assert header["b/3"]["dtype"] == "F32"
    assert header["b-bank/3"]["shape"] == [5, 8]
    start, stop = header["b/4"]["data_offsets"]
    assert np.array_equal(np.frombuffer(raw[8 + size :][start:stop], "<f4"), given[1].values[0])
    manifest = json.loads(header["__metadata__"]["pairtrace"])
    assert manifest == read_manifest(path)
    assert manifest["kinds"] == {"b": "vector", "b-bank": "bank"}
    assert manifest["model_fingerprint"] == "a" * 64
    assert manifest["tokenizer_fingerprint"] == "k" * 64
    assert manifest["behaviors"] == ["b", "b-bank"]


def test_a_row_of_a_bank_that_is_a_view_is_saved_alone(tmp_path: Path) -> None:
    big = any_values(0, 6, 8)
    part = Direction(name="b", layer=1, values=big[2:3], kind="vector", origin="t")
    save_directions(tmp_path / "b.safetensors", [part], {})
    assert np.array_equal(load_directions(tmp_path / "b.safetensors")[0].values, big[2:3])


def test_one_layer_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    save_directions(path, [direction(), direction(layer=4, seed=1), direction("c", 3)], {})
    assert [(d.name, d.layer) for d in load_directions(path, layer=3)] == [("b", 3), ("c", 3)]
    with pytest.raises(LayerError, match=r"no layer 4 for c; its layers are \[3, 4\]"):
        load_directions(path, layer=4)
    with pytest.raises(LayerError, match="no layer 9 for b, c"):
        load_directions(path, layer=9)


def test_width_and_model_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    save_directions(path, [direction()], {})
    assert load_directions(path, width=8, model_fingerprint="a" * 64, tokenizer_fingerprint="k" * 64)
    with pytest.raises(DirectionError, match="tokenizer with fingerprint " + "k" * 64 + ".*" + "b" * 64):
        load_directions(path, tokenizer_fingerprint="b" * 64)
    with pytest.raises(DirectionError, match="width 8; expected 16"):
        load_directions(path, width=16)
    with pytest.raises(DirectionError, match="a" * 64 + ".*" + "b" * 64):
        load_directions(path, model_fingerprint="b" * 64)


def test_plain_arrays_take_the_given_layer(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", any_values(0, 8).astype(np.float64))
    np.save(tmp_path / "bank.npy", any_values(1, 3, 8))
    vector = load_directions(tmp_path / "mine.npy", layer=5, width=8, model_fingerprint="x")[0]
    assert (vector.name, vector.layer, vector.kind, vector.values.shape) == ("mine", 5, "vector", (1, 8))
    assert load_directions(tmp_path / "bank.npy")[0].layer is None
    assert load_directions(tmp_path / "bank.npy", layer=1)[0].kind == "bank"
    save_file({"v": any_values(2, 8)}, tmp_path / "one.safetensors")
    save_file({"v/2": any_values(2, 8), "w/3": any_values(3, 8)}, tmp_path / "two.safetensors")
    assert [(d.name, d.layer) for d in load_directions(tmp_path / "one.safetensors", layer=4)] == [("one", 4)]
    assert [(d.name, d.layer) for d in load_directions(tmp_path / "two.safetensors")] == [("v", 2), ("w", 3)]


def test_bfloat16_tensors_are_widened_exactly(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    values = torch.randn(8, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_torch({"v": values}, tmp_path / "v.safetensors")
    loaded = load_directions(tmp_path / "v.safetensors", layer=1)[0]
    assert np.array_equal(loaded.values[0], values.float().numpy())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([1.0, np.nan]), "row 0 holds NaN"),
        (np.array([1.0, np.inf]), "row 0 holds NaN or infinity"),
        (np.array([1.0, 1e300]), "row 0 holds NaN or infinity"),
        (np.zeros(3), "row 0 is zero"),
        (np.array([[1.0, 2.0], [0.0, 0.0]]), "row 1 is zero"),
        (np.zeros((0, 3)), "empty"),
        (np.zeros((2, 2, 2)), "shape"),
        (np.array(["a"]), "type <U1"),
        (np.array([1j, 2.0]), "type complex128"),
    ],
)
def test_unusable_values_are_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    np.save(tmp_path / "v.npy", values)
    with pytest.raises(DirectionError, match=message):
        load_directions(tmp_path / "v.npy", layer=1)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "v.pt").write_bytes(b"x")
    with pytest.raises(DirectionError, match=r"unknown file type '\.pt'"):
        load_directions(tmp_path / "v.pt")
    (tmp_path / "v.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{garbage")
    with pytest.raises(DirectionError, match="cannot read"):
        load_directions(tmp_path / "v.safetensors")
    with pytest.raises(DirectionError, match="cannot read"):
        load_directions(tmp_path / "absent.npy")
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DirectionError, match="cannot read"):
        load_directions(tmp_path / "o.npy")


def test_an_archive_named_npy_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "v.npy").open("wb") as file:
        np.savez(file, a=any_values(0, 8))
    with pytest.raises(DirectionError, match=r"cannot read .*v\.npy as one array"):
        load_directions(tmp_path / "v.npy", layer=1)


def test_tensors_of_eight_bits_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")):
        save_torch({"v": torch.ones(8).to(dtype)}, tmp_path / "v.safetensors")
        with pytest.raises(DirectionError, match=f"tensor 'v' has type {name}; expected float32"):
            load_directions(tmp_path / "v.safetensors", layer=1)


def test_a_manifest_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    def save(tensors: dict[str, np.ndarray], manifest: Any) -> Path:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        save_file(tensors, tmp_path / "v.safetensors", metadata={"pairtrace": text})
        return tmp_path / "v.safetensors"

    good = {"schema_version": 1, "kinds": {"b": "vector"}}
    assert load_directions(save({"b/1": any_values(0, 4)}, good))
    for tensors, manifest, message in (
        ({"b/1": any_values(0, 4)}, {"schema_version": 1}, "kinds is None"),
        ({"b/1": any_values(0, 4)}, {**good, "kinds": ["b"]}, "kinds is"),
        ({"b/1": any_values(0, 4)}, {**good, "schema_version": 2}, "schema version 2"),
        ({"b/1": any_values(0, 4)}, "{", "not valid JSON"),
        ({"b/1": any_values(0, 2, 4)}, good, "calls it 'vector'"),
        ({"b": any_values(0, 4)}, good, "named behavior/layer"),
        ({"b/1": any_values(0, 4)}, {**good, "tensors": [{"weight": 1}]}, "tensors is"),
        ({"b/1": any_values(0, 4).astype(np.float64)}, good, "type float64"),
    ):
        with pytest.raises(DirectionError, match=message):
            load_directions(save(tensors, manifest))


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """In a direction, in another tensor, in what the manifest says of them; files without a checksum are older."""
    path = tmp_path / "b.safetensors"
    manifest: dict[str, Any] = {"created": "now", "layers": {9: 0.5, 10: float("nan")}, "shape": (1, 2)}
    save_directions(path, [direction()], manifest, tensors={"bias": np.ones(3), "none": np.empty(0)})
    assert load_directions(path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    data = {name: 8 + size + header[name]["data_offsets"][0] for name in ("b/3", "bias")}
    for place in (*data.values(), whole.index(b"now")):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DirectionError, match=r"is damaged: its values have the checksum .* was written"):
            load_directions(path)
        with pytest.raises(DirectionError, match="is damaged"):
            read_tensors(path)
    path.write_bytes(whole)
    older = {name: value for name, value in read_manifest(path).items() if name != "checksum"}
    tensors = {"b/3": direction().values[0], **read_tensors(path)}
    save_file(tensors, path, metadata={"pairtrace": json.dumps(older)})
    assert load_directions(path)[0].fingerprint == direction().fingerprint


def test_names_and_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for name in ("", "a b", "a/b", "a:b"):
        with pytest.raises(DirectionError, match="cannot name a behaviour"):
            direction(name)
    with pytest.raises(ConfigError, match="it is a directory"):
        save_directions(tmp_path, [direction()], {})
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(ConfigError, match="cannot write"):
        save_directions(blocked / "b.safetensors", [direction()], {})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.safetensors"
    save_directions(path, [direction()], {})
    before = path.read_bytes()

    original = Path.write_bytes

    def full_disk(target: Path, data: Any) -> int:
        original(target, b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(ConfigError, match="No space left"):
        save_directions(path, [direction(seed=9)], {})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.safetensors"]


def test_the_file_is_readable_like_any_other(tmp_path: Path) -> None:
    values = np.ones((1, 3), dtype=np.float32)
    path, plain = tmp_path / "b.safetensors", tmp_path / "plain"
    save_directions(str(path), [Direction(name="b", layer=1, values=values, kind="vector", origin="test")], {})
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode
