"""Formats are recognised, and rows become the pairs that TRL would make of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import extract_prompt, maybe_extract_prompt

from pairtrace.engine.formats import FORMATS, RowFormat
from pairtrace.engine.pair import Pair
from pairtrace.engine.recognition import recognise
from pairtrace.errors import ConfigError, DataFormatError

USER = {"role": "user", "content": "Name a color."}
RED = {"role": "assistant", "content": "Red."}
BLUE = {"role": "assistant", "content": "Blue."}
SYSTEM = {"role": "system", "content": "Be brief."}
HH = "\n\nHuman: Name a color.\n\nAssistant: "

EXAMPLES: dict[str, dict[str, Any]] = {
    "standard": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    "standard-implicit": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "conversational": {"prompt": [USER], "chosen": [RED], "rejected": [BLUE]},
    "conversational-implicit": {"chosen": [USER, RED], "rejected": [USER, BLUE]},
    "ultrafeedback": {"prompt": "Name a color.", "chosen": [USER, RED], "rejected": [USER, BLUE]},
    "hh-rlhf": {"chosen": HH + "Red.", "rejected": HH + "Blue."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Name a color."}],
        "chosen": {"from": "gpt", "value": "Red."},
        "rejected": [{"from": "gpt", "value": "Blue."}],
    },
}


def recognised(*rows: dict[str, Any], **options: Any) -> RowFormat:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return recognise(columns, rows, name="rows.jsonl", **options)


def normalised(row: dict[str, Any], **options: Any) -> Pair:
    return recognised(row, **options).normalise(0, row)


class TestRecognition:
    def test_there_is_an_example_of_every_format(self) -> None:
        assert EXAMPLES.keys() == FORMATS.keys()

    @pytest.mark.parametrize("name", FORMATS)
    def test_each_format(self, name: str) -> None:
        row = EXAMPLES[name]
        assert recognised(row, row).name == name

    @pytest.mark.parametrize("name", FORMATS)
    def test_a_bad_row_does_not_hide_the_format(self, name: str) -> None:
        row = EXAMPLES[name]
        bad = dict.fromkeys(row)
        assert recognised(bad, *[row] * 12, {**row, "chosen": 5}).name == name

    def test_source_column(self) -> None:
        row = EXAMPLES["standard"]
        assert recognised(row).source is None
        assert recognised({**row, "dataset": "a", "source": "b"}).source == "source"
        assert recognised({**row, "data_source": "a"}).source == "data_source"
        assert recognised({**row, "source": "b", "origin": "c", "who": "d"}, source="who").source == "who"

    def test_column_overrides(self) -> None:
        row = {"question": "The sky is", "good": " blue.", "bad": " green.", "chosen": [], "rejected": []}
        row_format = recognised(row, prompt="question", chosen="good", rejected="bad")
        assert row_format.name == "standard"
        assert row_format.columns == {"prompt": "question", "chosen": "good", "rejected": "bad", "source": None}
        pair = row_format.normalise(3, row)
        assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", " blue.", " green.")

    def test_a_format_that_ignores_the_prompt_column(self) -> None:
        row_format = recognised(EXAMPLES["ultrafeedback"])
        assert row_format.prompt is None and row_format.needed == ["chosen", "rejected"]

    @pytest.mark.parametrize(
        ("row", "options", "message"),
        [
            ({"question": "a", "good": "b"}, {}, r"no column 'chosen'.*--chosen.*columns found: question, good"),
            ({"chosen": "a", "bad": "b"}, {}, r"no column 'rejected'.*--rejected.*columns found: chosen, bad"),
            (EXAMPLES["standard"], {"source": "nope"}, r"no column 'nope'.*columns found: prompt, chosen, rejected"),
            (
                {"chosen": 1, "rejected": 2},
                {},
                r"not recognisable.*chosen: int.*columns found: chosen, rejected.*--format",
            ),
            ({"prompt": [USER], "chosen": "a", "rejected": "b"}, {}, r"not recognisable.*prompt: a list"),
            (
                {"question": "Say a color", "chosen": "Red", "rejected": "Blue"},
                {},
                r"share no beginning.*--prompt question.*--format standard-implicit",
            ),
            ({"chosen": "a", "rejected": "b"}, {"format": "standard"}, r"needs a prompt column.*--prompt"),
        ],
    )
    def test_what_is_not_recognised(self, row: dict[str, Any], options: dict[str, Any], message: str) -> None:
        with pytest.raises(DataFormatError, match=message):
            recognised(row, **options)

    def test_two_formats_in_one_file(self) -> None:
        rows = [EXAMPLES["standard-implicit"], EXAMPLES["conversational-implicit"]] * 5
        with pytest.raises(DataFormatError, match=r"look like .* \(5\) and .* \(5\); choose with --format"):
            recognised(*rows)

    def test_unknown_format(self) -> None:
        with pytest.raises(ConfigError, match="format is 'alpaca', expected one of standard, "):
            recognised(EXAMPLES["standard"], format="alpaca")

    def test_a_format_can_be_insisted_on(self) -> None:
        pair = normalised({"question": "x", "chosen": "Red", "rejected": "Rose"}, format="standard-implicit")
        assert (pair.prompt, pair.chosen, pair.rejected) == ("R", "ed", "ose")
        as_text = normalised(EXAMPLES["hh-rlhf"], format="standard-implicit")
        assert as_text.prompt == HH.rstrip(" ") and as_text.chosen == " Red."


class TestNormalising:
    @pytest.mark.parametrize("name", sorted(set(FORMATS) - {"standard", "standard-implicit"}))
    def test_all_conversations_come_out_alike(self, name: str) -> None:
        pair = normalised(EXAMPLES[name])
        assert (pair.prompt, pair.chosen, pair.rejected, pair.problem) == ([USER], [RED], [BLUE], "")

    @given(chosen=st.text("ab ", min_size=1, max_size=8), rejected=st.text("ab ", min_size=1, max_size=8))
    def test_implicit_text_prompts_are_trls(self, chosen: str, rejected: str) -> None:
        row = {"chosen": chosen, "rejected": rejected}
        row_format = RowFormat(name="standard-implicit", prompt=None, chosen="chosen", rejected="rejected", source=None)
        pair = row_format.normalise(0, row)
        assert {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} == extract_prompt(row)

    @given(
        st.lists(st.sampled_from([USER, RED, BLUE]), max_size=3),
        st.lists(st.sampled_from([USER, RED, BLUE]), max_size=3),
    )
    def test_implicit_message_prompts_are_trls(self, chosen: list[Any], rejected: list[Any]) -> None:
        row = {"prompt": "x", "chosen": [USER, *chosen, RED], "rejected": [USER, *rejected, BLUE]}
        pair = normalised(row)
        assert {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} == maybe_extract_prompt(row)

    def test_multi_turn_dialogue(self) -> None:
        start = "\n\nHuman: Hi\nthere\n\nAssistant:  Hello.\n\nHuman: Name a color."
        pair = normalised({"chosen": start + "\n\nAssistant: Red.", "rejected": start + "\n\nAssistant:"})
        assert pair.prompt == [
            {"role": "user", "content": "Hi\nthere"},
            {"role": "assistant", "content": " Hello."},
            USER,
        ]
        assert pair.chosen == [RED] and pair.rejected == [{"role": "assistant", "content": ""}]

    def test_sharegpt_roles(self) -> None:
        turns = ["system", "human", "function_call", "observation", "chatgpt", "User", "tool", "gpt", "model"]
        row = {
            "conversations": [{"from": speaker, "value": speaker} for speaker in turns],
            "chosen": "Red.",
            "rejected": "Blue.",
        }
        pair = normalised(row)
        assert isinstance(pair.prompt, list)
        assert [message["role"] for message in pair.prompt] == (
            ["system", "user", "assistant", "tool", "assistant", "user", "tool", "assistant", "assistant"]
        )
        assert pair.chosen == [RED]

    def test_sharegpt_system_column(self) -> None:
        row = {**EXAMPLES["sharegpt"], "system": "Be brief."}
        assert normalised(row).prompt == [SYSTEM, USER]
        assert normalised({**row, "system": ""}).prompt == [USER]

    def test_keys_that_arrow_filled_in_are_left_out(self) -> None:
        filled = {**RED, "tool_calls": None, "name": None}
        row = {"prompt": [USER], "chosen": [filled], "rejected": [BLUE]}
        assert normalised(row).chosen == [RED]
        assert normalised({"chosen": [USER, filled, BLUE], "rejected": [USER, RED, RED]}).prompt == [USER, RED]

    def test_tools_and_template_variables(self) -> None:
        row = {**EXAMPLES["conversational"], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"a": 1}}
        pair = normalised(row)
        assert pair.tools == [{"name": "f"}] and pair.chat_template_kwargs == {"a": 1}
        assert normalised({**row, "tools": ""}).tools is None

    def test_source(self) -> None:
        row = {**EXAMPLES["standard"], "source": "flan"}
        assert normalised(row).source == "flan"
        assert normalised({**row, "source": None}).source == ""
        assert normalised({**row, "source": 7}).source == "7"
        assert normalised({**row, "source": "a\ud800"}).source == "a?"
        assert normalised({**row, "chosen": None}, format="standard").source == "flan"
        assert recognised(EXAMPLES["standard"]).normalise(0, EXAMPLES["standard"], "file.jsonl").source == "file.jsonl"

    @pytest.mark.parametrize(
        ("name", "change", "problem"),
        [
            ("standard", {"chosen": None}, "chosen is null"),
            ("standard", {"prompt": None}, "prompt is null"),
            ("standard", {"rejected": ["x"]}, "rejected is a list, expected text"),
            ("standard-implicit", {"rejected": ""}, "rejected is empty text"),
            ("conversational", {"prompt": []}, "prompt is an empty list"),
            ("conversational", {"chosen": "Red."}, "chosen is str, expected a list of messages"),
            ("conversational", {"chosen": [{"content": "x"}]}, "message 1 of chosen has no role"),
            ("conversational", {"chosen": [{"role": "assistant"}]}, "message 1 of chosen has no content"),
            ("conversational", {"chosen": ["x"]}, "message 1 of chosen is str"),
            ("conversational", {"tools": "[{"}, "tools is not valid JSON"),
            ("conversational", {"tools": {"a": 1}}, "tools is a mapping, expected a list"),
            ("conversational", {"chat_template_kwargs": "x"}, "chat_template_kwargs is text"),
            ("conversational-implicit", {"rejected": [BLUE]}, "share no message"),
            ("ultrafeedback", {"chosen": [RED], "rejected": [BLUE]}, "share no message"),
            ("hh-rlhf", {"chosen": "Just text"}, "chosen has no turn"),
            ("hh-rlhf", {"chosen": "Intro" + HH + "Red."}, "chosen has text before its first turn"),
            ("hh-rlhf", {"rejected": HH + "Blue.\n\nHuman: Why?"}, "rejected does not end with an Assistant turn"),
            ("hh-rlhf", {"rejected": [USER, BLUE]}, "rejected is list"),
            (
                "sharegpt",
                {"chosen": {"from": "oracle", "value": "x"}},
                "message 1 of chosen has the unknown role 'oracle'",
            ),
            ("sharegpt", {"rejected": {"from": "gpt", "value": None}}, "message 1 of rejected has no text"),
            ("sharegpt", {"conversations": []}, "conversations is an empty list"),
        ],
    )
    def test_rows_that_do_not_fit(self, name: str, change: dict[str, Any], problem: str) -> None:
        row = {**EXAMPLES[name], **change}
        pair = recognised(row, format=name).normalise(11, row)
        assert problem in pair.problem
        assert (pair.row, pair.prompt, pair.chosen, pair.rejected) == (11, None, "", "")
