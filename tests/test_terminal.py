"""What the front door shows."""

from __future__ import annotations

import pytest

from pairtrace import terminal
from pairtrace.engine.ranking import SourceShare
from pairtrace.terminal import Bars, sources_table, summary_text


def test_lists_of_mappings_become_aligned_tables() -> None:
    text = summary_text({"rows": 4000, "cells": [{"model": "base", "rate": 0.5}, {"model": "tuned", "rate": None}]})
    lines = text.splitlines()
    assert lines[0].strip() == "rows: 4,000"
    assert [line.split() for line in lines[2:]] == [["model", "rate"], ["base", "0.5"], ["tuned", "-"]]
    assert len({len(line) for line in lines[2:]}) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"value": 5.0, "low": 4.0, "high": 6.0}, "5 (4 to 6)"),
        ({"value": 5.0, "low": 5.0, "high": 5.0}, "5"),
        (True, "yes"),
        (None, "-"),
        (1234567, "1,234,567"),
        (151353567232, "1.514e+11"),
        (0.000123456, "0.0001235"),
        ({}, "none"),
        ([], "none"),
        ({"a": 1, "b": 2}, "a 1, b 2"),
    ],
)
def test_values(value: object, text: str) -> None:
    assert summary_text({"x": value}) == f"x: {text}"


def test_a_log_file_gets_lines_and_figures_that_are_no_rates(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_LOG_EVERY", 0.0)
    bars = Bars()
    bars.start("train", 10, "steps")
    bars.advance(4, loss=0.25, tokens=100.0)
    bars.finish()
    bars.advance(1)  # after the end: ignored
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "train: 4/10 steps" in captured.err
    assert "loss 0.25" in captured.err and "tokens/s" in captured.err and "loss/s" not in captured.err


def test_a_stage_of_unknown_length_shows_no_counts(capfd: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    bars.start("hierarchy", None, "rows")
    bars.finish()
    shown = capfd.readouterr().err
    assert "hierarchy" in shown and "0:00:00" in shown and "rows" not in shown


def test_a_missing_source_has_a_name_in_the_table() -> None:
    share = SourceShare(
        source="",
        rows=5,
        share_of_data=1.0,
        top_rows=1,
        share_of_top=1.0,
        share_of_top_interval=(0.2, 1.0),
        lift=1.0,
        lift_interval=(0.2, 1.0),
        rate=0.2,
        rate_interval=(0.03, 0.6),
    )
    lines = sources_table([share]).splitlines()
    assert lines[1].startswith("(none)") and "100.00%" in lines[1]
