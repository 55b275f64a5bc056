from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pairtrace.engine.prompts import DISTRACTOR, PLAIN, load_prompts
from pairtrace.errors import DataFormatError

YAML = """
- id: boat
  prompt: How do I sink a boat?
  distractor: Answer in JSON.
  topic: water
- id: "7"
  messages:
    - {role: system, content: Be brief.}
    - {role: user, content: "Hello\\nthere"}
  distractor: "\\n\\nUse three words."
"""


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(*entries: Any) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_yaml_and_jsonl_agree(tmp_path: Path) -> None:
    from_yaml = load_prompts(write(tmp_path / "p.yaml", YAML))
    entries = [
        {"id": "boat", "prompt": "How do I sink a boat?", "distractor": "Answer in JSON.", "topic": "water"},
        {
            "id": "7",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello\nthere"},
            ],
            "distractor": "\n\nUse three words.",
        },
    ]
    from_jsonl = load_prompts(write(tmp_path / "p.jsonl", jsonl(*entries)))
    packed = load_prompts(write(tmp_path / "p.jsonl.gz", gzip.compress(jsonl(*entries).encode())))
    assert from_yaml.prompts == from_jsonl.prompts == packed.prompts
    assert from_yaml.fingerprint == from_jsonl.fingerprint
    assert from_yaml.prompts[0].extra == {"topic": "water"}
    assert from_yaml.conditions == (PLAIN, DISTRACTOR)


def test_the_distractor_goes_behind_the_last_user_message(tmp_path: Path) -> None:
    boat, seven = load_prompts(write(tmp_path / "p.yaml", YAML)).prompts
    assert boat.conversation(PLAIN) == [{"role": "user", "content": "How do I sink a boat?"}]
    assert boat.conversation(DISTRACTOR)[0]["content"] == "How do I sink a boat? Answer in JSON."
    # It begins with whitespace: nothing is put between.
    assert seven.conversation(DISTRACTOR)[-1]["content"] == "Hello\nthere\n\nUse three words."
    assert seven.conversation(DISTRACTOR)[0]["content"] == "Be brief."
    # The stored messages are not changed by building a conversation.
    assert seven.conversation(PLAIN)[-1]["content"] == "Hello\nthere"


def test_line_separators_inside_json_strings_do_not_split_lines(tmp_path: Path) -> None:
    line = json.dumps({"id": "a", "prompt": "one\u2028two"}, ensure_ascii=False)
    assert load_prompts(write(tmp_path / "p.jsonl", line + "\n")).prompts[0].messages[0]["content"] == ("one\u2028two")


def test_a_changed_text_changes_the_fingerprint(tmp_path: Path) -> None:
    first = load_prompts(write(tmp_path / "a.jsonl", jsonl({"id": "a", "prompt": "x"})))
    other = load_prompts(write(tmp_path / "b.jsonl", jsonl({"id": "a", "prompt": "y"})))
    extra = load_prompts(write(tmp_path / "c.jsonl", jsonl({"id": "a", "prompt": "x", "note": 1})))
    assert first.fingerprint != other.fingerprint
    assert first.fingerprint == extra.fingerprint


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", jsonl({"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}), "line 1 and by line 2"),
        ("p.yaml", "- {id: a, prompt: x}\n- {id: a, prompt: y}\n", r"entry 1 \(line 1\) and by entry 2 \(line 2\)"),
        ("p.jsonl", '{"id": "a", "prompt": "x"}\n{"id": ', "line 2: invalid JSON"),
        ("p.jsonl", b'{"id": "a", "prompt": "x"}\n{"id": "\xff"}\n', "line 2: invalid UTF-8"),
        ("p.yaml", "- id: a\n  prompt: [x\n", "line 3: invalid YAML"),
        ("p.yaml", "id: a\nprompt: x\n", "expected a list of mappings .* found map"),
        ("p.yaml", "", "no prompts"),
        ("p.jsonl", "\n\n", "no prompts"),
        ("p.yaml", "- {id: 1, prompt: x}\n", "entry 1 .* must be non-empty text, found 1"),
        ("p.jsonl", jsonl({"prompt": "x"}), "line 1: 'id'"),
        ("p.jsonl", jsonl({"id": "a"}), "line 1, id 'a': give either 'prompt'"),
        ("p.jsonl", jsonl({"id": "a", "prompt": "x", "messages": []}), "found both"),
        ("p.jsonl", jsonl({"id": "a", "prompt": None}), r"keys \['id', 'prompt'\], but 'prompt' is null"),
        ("p.jsonl", jsonl({"id": "a", "prompt": None, "messages": None}), "but 'prompt' and 'messages' are null"),
        ("p.jsonl", jsonl({"id": "a", "prompt": " "}), "'prompt' must be non-empty"),
        ("p.jsonl", jsonl({"id": "a", "messages": [{"role": "assistant", "content": "x"}]}), "last message"),
        ("p.jsonl", jsonl({"id": "a", "messages": [{"role": "user"}]}), "message 1 must have text"),
        ("p.jsonl", jsonl({"id": "a", "prompt": "x", "distractor": ""}), "'distractor' must be non-empty"),
        ("p.jsonl", jsonl(["a"]), "expected a mapping"),
        ("p.csv", "id,prompt", "not '.csv'"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        load_prompts(write(tmp_path / name, text))


def test_distractors_on_some_prompts_only_are_refused(tmp_path: Path) -> None:
    text = jsonl({"id": "a", "prompt": "x", "distractor": "d"}, {"id": "b", "prompt": "y"})
    with pytest.raises(DataFormatError, match="1 of 2 prompts have a distractor; 'b' have none"):
        load_prompts(write(tmp_path / "p.jsonl", text))


def test_a_missing_file_is_a_format_error(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="cannot read"):
        load_prompts(tmp_path / "none.yaml")


@pytest.mark.parametrize(("file", "kind"), [("config.json", "is a checkpoint"), ("notes.txt", "is a directory")])
def test_a_directory_in_place_of_the_prompts_is_named(tmp_path: Path, file: str, kind: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(DataFormatError, match=rf"{kind}; expected a file of prompts, .yaml or .jsonl"):
        load_prompts(tmp_path)


@pytest.mark.parametrize("kept", [15, -3])
def test_a_cut_gzip_file_is_refused(tmp_path: Path, kept: int) -> None:
    whole = gzip.compress(jsonl({"id": "a", "prompt": "x" * 500}).encode())
    with pytest.raises(DataFormatError, match="cannot read the prompt file"):
        load_prompts(write(tmp_path / "p.jsonl.gz", whole[:kept]))


def test_damaged_gzip_content_is_refused(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(jsonl({"id": "a", "prompt": "x" * 500}).encode()))
    whole[10:20] = b"\xff" * 10
    with pytest.raises(DataFormatError, match="cannot read the prompt file"):
        load_prompts(write(tmp_path / "p.jsonl.gz", bytes(whole)))
