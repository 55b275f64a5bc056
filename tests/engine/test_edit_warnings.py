"""Edits that are refused or come with a warning: lopsided scores, swapped arguments, more than half of the data."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from pairtrace.engine.edit import edit
from pairtrace.engine.edit_config import EditConfig
from pairtrace.engine.selection import SelectionRule
from pairtrace.errors import ConfigError, DataFormatError
from tests.engine import pair_files
from tests.engine.scored_files import write_scored

N = 2500
SCORES = np.random.default_rng(0).normal(0.0, 0.2, N).clip(-1, 1).astype(np.float32)


def test_a_lopsided_ranking_is_not_cut_by_its_other_end(tmp_path: Path) -> None:
    """As the margins of trained pairs: nearly all above zero, which would make them all discoveries."""
    data = pair_files.write_jsonl(tmp_path, pair_files.make_rows(N))
    path = write_scored(tmp_path / "s.parquet", data, np.abs(SCORES) + 0.1)
    rule = SelectionRule(fdr=0.1)
    out = tmp_path / "e.parquet"
    with pytest.raises(ConfigError, match=r"median is 0\.\d+ .*100% of the pairs.*; select with -k") as caught:
        edit(EditConfig(scores=path, out=str(out), action="filter", rule=rule))
    assert "--null random" not in str(caught.value), "such a file names no directions"
    assert not out.exists()


def test_arguments_that_changed_places_are_told(tmp_path: Path) -> None:
    data = pair_files.write_jsonl(tmp_path, pair_files.make_rows(N))
    path = write_scored(tmp_path / "s.parquet", data, SCORES)
    out, rule = str(tmp_path / "e.parquet"), SelectionRule(k=1)
    with pytest.raises(DataFormatError, match=r"s\.parquet, given as the data, is a scores file.*look swapped"):
        edit(EditConfig(scores=str(data), data=path, out=out, action="filter", rule=rule))
    with pytest.raises(DataFormatError, match="not a scores file: it is not even parquet; expected is the"):
        edit(EditConfig(scores=str(data), data=str(data), out=out, action="filter", rule=rule))


def test_an_edit_of_more_than_half_of_the_data_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = pair_files.write_jsonl(tmp_path, pair_files.make_rows(N))
    path = write_scored(tmp_path / "s.parquet", data, SCORES)
    for action, k, said in (("filter", 1251, "removes 1251 of 2500"), ("swap", 1251, "swaps 1251"), ("swap", 1250, "")):
        caplog.clear()
        rule = SelectionRule(k=k)
        with caplog.at_level(logging.WARNING, logger="pairtrace"):
            edit(EditConfig(scores=path, out=str(tmp_path / "e.parquet"), action=action, rule=rule))  # type: ignore[arg-type]
        assert said in caplog.text and ("more than half" in caplog.text) == bool(said)
