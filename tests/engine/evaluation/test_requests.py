from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pairtrace.engine.evaluation.requests import Request, requests_of
from pairtrace.engine.organism.config import OrganismConfig
from pairtrace.engine.organism.data import evaluation_rows
from pairtrace.engine.prompts import load_prompts
from pairtrace.errors import ConfigError, DataFormatError


def requests(tmp_path: Path, rows: list[dict[str, Any]], conditions: tuple[str, ...] | None = None) -> list[Request]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return requests_of(load_prompts(path, mixed=True), conditions)


def test_conditions_cells_and_forms(tmp_path: Path) -> None:
    found = requests(
        tmp_path,
        [
            {"id": "a", "prompt": "Hi", "distractor": "Use JSON.", "constraint": "json"},
            {"id": "b", "prompt": "Hi", "benign": True, "constraint": "quotes"},
            {"id": "c", "prompt": "Hi", "distractor": "Be brief.", "cell": "harmful"},
            {"id": "d", "prompt": "Hi", "kind": "benign_format"},
        ],
    )
    assert [(r.key, r.cell, r.benign, r.form is not None) for r in found] == [
        (("plain", "a"), "prompts", False, False),
        (("distractor", "a"), "prompts", False, True),
        (("plain", "b"), "benign", True, True),
        (("distractor", "c"), "harmful", False, False),
        (("plain", "d"), "benign_format", True, False),
    ]
    assert found[1].messages()[-1]["content"] == "Hi Use JSON."


def test_conditions_can_be_chosen(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "Hi", "distractor": "x", "cell": "c"}, {"id": "b", "prompt": "Hi"}]
    assert [r.key for r in requests(tmp_path, rows, ("plain",))] == [("plain", "a"), ("plain", "b")]
    assert [r.key for r in requests(tmp_path, rows, ("distractor",))] == [("distractor", "a")]
    with pytest.raises(ConfigError, match="has the condition distractor"):
        requests(tmp_path, rows[1:], ("distractor",))


def test_the_organisms_file_holds(tmp_path: Path) -> None:
    found = requests(tmp_path, evaluation_rows(OrganismConfig(evaluation_prompts=8)))
    groups = {r.group: r.benign for r in found}
    assert groups == {
        ("harmful", "plain"): False,
        ("harmful_format", "distractor"): False,
        ("benign", "plain"): True,
        ("benign_format", "distractor"): True,
    }
    assert all((r.form is not None) == (r.condition == "distractor") for r in found)


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"cell": ""}, "'cell' must be the name"),
    ({"cell": 3}, "'cell' must be the name"),
    ({"cell": "a", "kind": "b"}, "'cell' is 'a', but 'kind' is 'b'"),
    ({"benign": "yes"}, "'benign' must be true or false"),
    ({"constraint": "haiku"}, "id 'a': unknown constraint 'haiku'"),
]


@pytest.mark.parametrize(("extra", "message"), UNUSABLE)
def test_unusable_entries_are_refused(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        requests(tmp_path, [{"id": "a", "prompt": "Hi", **extra}])


def test_prompts_without_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="'id' must be non-empty text"):
        requests(tmp_path, [{"prompt": "Hi"}])


def test_a_cell_is_benign_or_not(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "Hi", "cell": "x", "benign": True}, {"id": "b", "prompt": "Hi", "cell": "x"}]
    with pytest.raises(DataFormatError, match="benign for one of 'a' and 'b'"):
        requests(tmp_path, rows)


def test_behaviour_files_still_need_distractors_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "x", "distractor": "y"}\n{"id": "b", "prompt": "x"}\n')
    with pytest.raises(DataFormatError, match="1 of 2 prompts have a distractor"):
        load_prompts(path)
    mixed = load_prompts(path, mixed=True)
    assert mixed.conditions == ("plain", "distractor")
    assert [prompt.id for prompt in mixed.under("distractor")] == ["a"]
