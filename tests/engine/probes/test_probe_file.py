"""Probe files: what was written comes back, and `score` reads it as a direction file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairtrace.engine.directions import load_directions, read_manifest, read_tensors, save_directions
from pairtrace.engine.probes.probe_file import Probe, load_probes, save_probes, sigmoid
from pairtrace.errors import DirectionError, ProbeMismatchError
from tests.engine.probes.cases import PRINTS, make_probe


def write(path: Path, *probes: Probe) -> str:
    save_probes(path, probes, {"note": "x"})
    return str(path)


def three(path: Path) -> str:
    return write(
        path,
        make_probe(),
        make_probe(layer=4, seed=1),
        make_probe(name="harm-held", role="held-out", members=3, seed=2),
    )


def test_round_trip(tmp_path: Path) -> None:
    path = three(tmp_path / "p.safetensors")
    found = load_probes(path, **{key: value for key, value in PRINTS.items() if "template" not in key}, width=32)
    assert [(probe.name, probe.layer, probe.role, probe.members) for probe in found] == [
        ("harm", 2, "training", 1),
        ("harm", 4, "training", 1),
        ("harm-held", 2, "held-out", 3),
    ]
    np.testing.assert_array_equal(found[2].weight, make_probe(members=3, seed=2).weight)
    np.testing.assert_array_equal(found[2].bias, make_probe(members=3, seed=2).bias)
    assert [probe.layer for probe in load_probes(path, roles=("training",))] == [2, 4]
    assert [probe.name for probe in load_probes(path, layers=(2,))] == ["harm", "harm-held"]


def test_directions_are_vectors_and_an_ensemble_is_its_mean_direction(tmp_path: Path) -> None:
    directions = load_directions(three(tmp_path / "p.safetensors"))
    assert [(one.name, one.layer, one.kind) for one in directions] == [
        ("harm", 2, "vector"),
        ("harm", 4, "vector"),
        ("harm-held", 2, "vector"),
    ]
    np.testing.assert_array_equal(directions[0].values[0], make_probe().weight[0])
    members = make_probe(members=3, seed=2).weight.astype(np.float64)
    expected = sum(one / np.sqrt((one * one).sum()) for one in members) / 3
    np.testing.assert_allclose(directions[2].values[0], expected, rtol=1e-6)


def test_probabilities_are_those_of_the_definition() -> None:
    probe = make_probe(members=3)
    rows = np.random.default_rng(5).normal(size=(7, 32)).astype(np.float32)
    logits = np.array([[row @ one.astype(float) for one in probe.weight] for row in rows.astype(float)]) + probe.bias
    expected = (1 / (1 + np.exp(-logits))).mean(axis=1)
    np.testing.assert_allclose(probe.probabilities(rows), expected, rtol=1e-12)
    np.testing.assert_allclose(sigmoid(np.array([-1000.0, 0.0, 1000.0])), [0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (3,)}, "holds no layer 3: expected 3, found 2, 4"),
        ({"names": ("mercy",)}, "holds no probe mercy"),
        ({"roles": ("baseline",)}, "holds no probe of the role baseline"),
        ({"layers": (4,), "names": ("harm-held",)}, "no probe that fits all"),
        ({"width": 31}, "belongs to another width: expected 31, found 32"),
        ({"model_fingerprint": "9" * 64}, f"another model fingerprint: expected {'9' * 64}, found {'1' * 64}"),
        ({"tokenizer_fingerprint": "9" * 64}, "another tokenizer fingerprint"),
    ],
)
def test_a_probe_that_does_not_fit_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = three(tmp_path / "p.safetensors")
    with pytest.raises(ProbeMismatchError, match=message) as caught:
        load_probes(path, **options)
    assert caught.value.expected is not None and caught.value.actual is not None


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    directions = load_directions(three(tmp_path / "p.safetensors"), layer=2)
    save_directions(path, directions, {})
    with pytest.raises(DirectionError, match="is not a probe file"):
        load_probes(path)
    with pytest.raises(DirectionError, match="is not a probe file"):
        load_probes(tmp_path / "x.npy")
    save_directions(path, directions, {"kind": "probe", "roles": {"harm": "training"}}, tensors={})
    with pytest.raises(DirectionError, match="is damaged: harm/2 has no weights"):
        load_probes(path)
    # A number for each member is needed, not a row of them.
    tensors = {**read_tensors(tmp_path / "p.safetensors"), "bias:harm/2": np.full((1, 1), 0.5)}
    save_directions(path, directions, {"kind": "probe", "roles": {"harm": "training"}}, tensors=tensors)
    with pytest.raises(DirectionError, match="is damaged: harm/2 has no weights"):
        load_probes(path)
    # Weights of three probes, but the directions of two.
    whole = tmp_path / "p.safetensors"
    save_directions(path, directions, {**read_manifest(whole)}, tensors=read_tensors(whole))
    with pytest.raises(DirectionError, match="is damaged: the probe harm/4 has weights and no direction"):
        load_probes(path)
    save_directions(path, directions, {"tensors": ["gone"]})
    with pytest.raises(DirectionError, match="names the tensor 'gone', which is not there"):
        read_tensors(path)
    with pytest.raises(DirectionError, match="holds NaN or infinity"):
        make_probe(bias=np.array([np.nan]))
