"""`pairtrace discover show`: what it prints of a product."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from pairtrace.commands import discovery_show
from pairtrace.engine.discovery.product import write_product
from pairtrace.errors import ConfigError, DataError
from pairtrace.terminal import Answer
from tests.engine.discovery.discoveries import ENRICHED, make_cluster, make_discovery


def show(*arguments: object) -> Answer:
    """The answer of the command, before it is printed."""
    answers: list[Answer] = []
    app = typer.Typer(result_callback=answers.append)
    app.add_typer(discovery_show.app)
    app.callback()(lambda: None)
    result = CliRunner().invoke(app, ["show", *map(str, arguments)])
    if result.exception is not None and not answers:
        raise result.exception
    return answers[0]


def test_all_clusters(tmp_path: Path) -> None:
    made = make_discovery()
    write_product(tmp_path, made)
    lines = str(show(tmp_path)).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["view:", "pairs"],
        ["layer:", "5"],
        ["items:", "10"],
        ["clustered:", "7"],
        ["noise:", "3"],
    ]
    assert lines[6].split() == ["cluster", "size", "share", "cosine", "stability", "most", "enriched", "in", "name"]
    assert "0.80 stable" in lines[7] and "source web: 75% against 0%" in lines[7] and "praises the user" in lines[7]
    assert lines[8].split()[:3] == ["1", "3", "30.0%"]
    assert json.loads(str(show(tmp_path, "--json"))) == made.to_dict() | {
        "clusters": json.loads(json.dumps(made.to_dict()["clusters"]))
    }


def test_prompts_that_have_no_item_are_told(tmp_path: Path) -> None:
    write_product(tmp_path, make_discovery("prompts", details={"prompts": {"changed": 10, "unchanged": 1990}}))
    lines = str(show(tmp_path)).splitlines()
    assert [line.split(maxsplit=1) for line in lines[:4]] == [
        ["view:", "prompts"],
        ["asked:", "2,000 (10 changed, 1,990 unchanged)"],
        ["layer:", "5"],
        ["items:", "10"],
    ]


def test_pairs_that_are_no_items_are_told(tmp_path: Path) -> None:
    rows = {"rows": 1500, "used": 10, "undefined": 0, "not_finite": 2, "not_sampled": 1488}
    write_product(tmp_path, make_discovery(details={"rows": rows}))
    lines = str(show(tmp_path)).splitlines()
    assert lines[1].split(maxsplit=1) == [
        "pairs:",
        "1,500 (10 used, 2 with NaN or infinity, 1,488 not sampled)",
    ]


def test_noise_alone_comes_with_advice(tmp_path: Path) -> None:
    noise = np.full(10, -1, np.int32)
    nothing = {"probabilities": np.zeros(10, np.float32), "cosines": np.full(10, np.nan, np.float32)}
    write_product(
        tmp_path, make_discovery(clusters=(), labels=noise, directions=np.empty((0, 24), np.float32), **nothing)
    )
    assert (
        str(show(tmp_path)).splitlines()[-1].startswith("no cluster: all items are noise; a lower --min-cluster-size")
    )
    assert json.loads(str(show(tmp_path, "--json")))["clusters"] == []


def test_one_cluster(tmp_path: Path) -> None:
    cluster = make_cluster("prompts", 0, 4, verdicts={"flagged": True, "p_value": 0.001}, enrichment=(ENRICHED,))
    write_product(tmp_path, make_discovery("prompts", clusters=(cluster, make_cluster("prompts", 1, 3))))
    text = str(show(tmp_path, "--cluster", 0, "--width", 3))
    for part in (
        "cluster 0: praises the user  (flagged)",
        "  4 of 10 items, persistence 0.250",
        "  direction cluster-0: cosine of the members 0.700 (median), 0.400 (5th percentile)",
        "  stability 0.80 stable: lowest 0.50; of 20 runs 15 recovered and 1 dissolved it",
        "  flagged: yes",
        "75.0%  (30.0% - 95.0%)",
        "  p3  probability 1.00  cosine +0.900",
        "      prompt: ho…",
        "  row 8  cosine +0.950  web",
    ):
        assert part in text
    assert json.loads(str(show(tmp_path, "--cluster", 0, "--json")))["verdicts"]["flagged"] is True
    assert "flagged" in str(show(tmp_path)).splitlines()[6]


def test_what_is_not_there(tmp_path: Path) -> None:
    write_product(tmp_path, make_discovery())
    for number in (2, -1):
        with pytest.raises(ConfigError, match=f"--cluster is {number}; the clusters in .* are 0 to 1"):
            show(tmp_path, "--cluster", number)
    with pytest.raises(DataError, match="there is no discovery"):
        show(tmp_path / "nowhere")
