"""Journals of unfinished runs; what they hold is tested with the stages that keep them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pairtrace.engine.journal import Journal, require_same_run
from pairtrace.errors import ConfigError, DataMismatchError


def test_only_one_run_at_a_time_writes(tmp_path: Path) -> None:
    """Else each would write its own first line, and the next run would stumble over the second."""
    path = tmp_path / "run.partial.jsonl"
    with Journal(path, {"seed": 1}) as journal:
        journal.append([{"key": 1}])
        with pytest.raises(ConfigError, match=r"another run is writing to .*run\.partial\.jsonl"):
            Journal(path, {"seed": 1}).__enter__()
        journal.append([{"key": 2}])
    with Journal(path, {"seed": 1}) as journal:
        assert journal.entries == [{"key": 1}, {"key": 2}]
    assert json.loads(path.read_text().splitlines()[0]) == {"identity": {"seed": 1}}


@pytest.mark.parametrize("vllm_here", [True, False])
def test_the_back_end_that_goes_without_saying_is_named(vllm_here: bool, tmp_path: Path) -> None:
    """Nobody is told that a run was made with "None": what helps is --backend hf."""
    named, unsaid = {"seed": 1, "backend": "vllm"}, {"seed": 1}
    expected, actual = (named, unsaid) if vllm_here else (unsaid, named)
    there, here = ("hf", "vllm") if vllm_here else ("vllm", "hf")
    with pytest.raises(DataMismatchError, match=f"made with backend '{there}', but this run asks for '{here}'"):
        require_same_run(expected, actual, tmp_path / "r.parquet")
