"""Which workers take the shards, and what is said of them, without a cluster."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pairtrace.engine.extract import ExtractConfig
from pairtrace.engine.extract_cluster import with_absolute_paths
from pairtrace.engine.extract_crew import Crew, muster
from pairtrace.engine.extract_messages import ClusterRun, Joined
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ConfigError
from pairtrace.store.staging import leave_probe

WORKERS: dict[str, Any] = {
    "a": {"nthreads": 4, "resources": {"MEMORY": 2.0}},
    "b": {"nthreads": 4, "resources": {"GPU": 1.0}},
    "c": {"nthreads": 2, "resources": {"GPU": 4}},
}


@pytest.mark.parametrize(
    ("device", "slots", "resources"),
    [
        ("auto", {"b": 1, "c": 2}, {"GPU": 1}),
        ("cuda", {"b": 1, "c": 2}, {"GPU": 1}),
        ("cpu", {"a": 4, "b": 4, "c": 2}, {}),
    ],
)
def test_workers_with_a_gpu_take_the_shards(device: str, slots: dict[str, int], resources: dict[str, float]) -> None:
    assert Crew.of(WORKERS, device) == Crew(slots, resources)
    assert Crew.of({"a": WORKERS["a"]}, device) == Crew({"a": 4}, {})


def run_at(store: Path, device: str = "auto") -> ClusterRun:
    config = ExtractConfig(data="d", model="m", layers=(1,), store=str(store), device=device)
    return ClusterRun(id="1", version="1", config=config, identity="", reuse=(), probe="")


def summoned(run: ClusterRun, answers: dict[str, Any], caplog: pytest.LogCaptureFixture) -> str:
    """What is said when the workers answer so."""
    asked: list[list[str]] = []

    def answer(_: Any, sent: ClusterRun, *, workers: list[str], on_error: str) -> dict[str, Any]:
        assert sent is run and on_error == "return"
        asked.append(workers)
        return answers

    client = SimpleNamespace(nthreads=lambda: dict.fromkeys(WORKERS, 1), run=answer)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        muster(client, Crew.of(WORKERS, run.config.device), run, "tcp://s:1")
    assert asked == [["b", "c"] if run.config.device != "cpu" else ["a", "b", "c"]]
    return caplog.text


def joined(store: Path, **changes: Any) -> Joined:
    good = Joined(host="h", device="cpu", gpu=None, versions=library_versions(), probe=leave_probe(store))
    return replace(good, **changes)


def test_what_is_said_of_the_workers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = summoned(run_at(tmp_path), {"b": joined(tmp_path), "c": joined(tmp_path)}, caplog)
    assert "2 of 3 workers declare the resource GPU" in said and "WARNING" not in said
    assert not summoned(run_at(tmp_path, "cpu"), {"a": joined(tmp_path)}, caplog)
    mixed = {"b": joined(tmp_path, device="cuda:0", gpu="x"), "c": joined(tmp_path)}
    assert "different devices (1 on cpu and 1 on cuda)" in summoned(run_at(tmp_path), mixed, caplog)
    shared = {name: joined(tmp_path, device="cuda", gpu="x") for name in "bc"}
    assert "2 workers use the same GPU (x)" in summoned(run_at(tmp_path), shared, caplog)
    older = {"b": joined(tmp_path, versions={**library_versions(), "torch": "1.0"})}
    assert "worker at b has torch 1.0 where this machine has torch" in summoned(run_at(tmp_path), older, caplog)


def test_workers_that_cannot_take_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refusal = ConfigError("the Dask worker at b cannot take part: it sees nothing")
    with pytest.raises(ConfigError, match="it sees nothing"):
        summoned(run_at(tmp_path), {"b": refusal}, caplog)
    with pytest.raises(
        ConfigError, match=r"worker at c cannot take part: OSError\('gone'\); run the same command again"
    ):
        summoned(run_at(tmp_path), {"b": joined(tmp_path), "c": OSError("gone")}, caplog)
    lost = {"b": joined(tmp_path, probe="status/.probe-elsewhere.partial")}
    with pytest.raises(ConfigError, match=r"worker at b on h writes to .* does not arrive here"):
        summoned(run_at(tmp_path), lost, caplog)


def test_paths_are_absolute_on_the_way_to_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.jsonl", "own.jinja", "old", "acts"):
        Path(name).touch()
    config = ExtractConfig(
        data="pairs.jsonl", model="org/name", layers=(1,), store="acts", reuse=("old", "s3://bucket/old"),
        chat_template="own.jinja",
    )  # fmt: skip
    sent = with_absolute_paths(config)
    assert (sent.data, sent.model, sent.store) == (f"{tmp_path}/pairs.jsonl", "org/name", f"{tmp_path}/acts")
    assert (sent.reuse, sent.chat_template) == ((f"{tmp_path}/old", "s3://bucket/old"), f"{tmp_path}/own.jinja")
    assert with_absolute_paths(replace(config, store="s3://bucket/acts")).store == "s3://bucket/acts"
