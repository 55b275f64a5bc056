"""Rendering must give the very tokens that TRL's DPO trainer trains on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from pairtrace.engine import rendering
from pairtrace.engine.pairs import Pair, open_pairs
from pairtrace.engine.rendering import Quarantined, RenderedPair, Renderer
from tests.engine import rendering_cases as cases
from tests.engine import trl_reference

USER = {"role": "user", "content": "Name a color."}
RED = {"role": "assistant", "content": "Red."}
BLUE = {"role": "assistant", "content": "Blue, like the sky."}
# All rows at the trainer's default limit, some of them at others: tokenising takes most of the time.
SOME = 250
LIMITS = [(1024, "keep_start", None), (None, "keep_start", SOME), (48, "keep_start", SOME), (256, "keep_end", SOME)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return ["the cat sat on the mat, and then it was happy: what do you think about that? " * 3, *map(str, range(50))]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Any:
    return cases.make_tokenizer(texts)


class Case:
    """Rows as TRL takes them, the same rows as pairs, and what TRL makes of them."""

    def __init__(self, rows: list[dict[str, Any]], pairs: list[Pair], tokenizer: Any) -> None:
        self.rows, self.pairs, self.tokenizer = rows, pairs, tokenizer
        self.prepared = trl_reference.prepare(rows, tokenizer)
        assert [entry["row"] for entry in self.prepared] == list(range(len(rows)))

    def mismatches(self, max_length: int | None, truncation: str, rows: int | None = None) -> tuple[Counter[str], int]:
        """Outcomes by code, after comparing each row with TRL; and the number of rows that differ."""
        renderer = Renderer(self.tokenizer, max_length=max_length, truncation=truncation)
        pairs, prepared = self.pairs[:rows], self.prepared[:rows]
        results = [
            result for first in range(0, len(pairs), 100) for result in renderer.render(pairs[first : first + 100])
        ]
        assert [result.row for result in results] == [pair.row for pair in pairs]
        outcomes: Counter[str] = Counter()
        different = 0
        reference = trl_reference.collate(prepared, max_length=max_length, truncation=truncation)
        for row, entry, sides, result in zip(self.rows, prepared, reference, results, strict=False):
            expected = _expected_code(row, entry, sides, max_length, truncation)
            if isinstance(result, Quarantined):
                outcomes[result.code] += 1
                different += result.code != expected
                continue
            outcomes["ok"] += 1
            different += expected != "ok" or not _same(result, sides)
        assert outcomes.total() == len(pairs)
        return outcomes, different


def _expected_code(
    row: dict[str, Any], entry: dict[str, Any], sides: Any, max_length: int | None, truncation: str
) -> str:
    """What should become of a row, from the raw row and from TRL's tokens."""
    responses = [
        row[side] if isinstance(row[side], str) else row[side][-1]["content"] for side in ("chosen", "rejected")
    ]
    if "prompt" not in row and isinstance(row["chosen"], str):  # text: what TRL leaves of the shorter text
        shared = trl_reference_extract(row)
        responses = [shared["chosen"], shared["rejected"]]
    if any(not response.strip() for response in responses):
        return "empty_response"
    if max_length is not None and truncation == "keep_start" and len(entry["prompt_ids"]) >= max_length:
        return "prompt_too_long"
    if not all(side.loss_positions for side in sides):
        return "no_loss_tokens"
    return "identical" if sides[0] == sides[1] else "ok"


def trl_reference_extract(row: dict[str, Any]) -> dict[str, Any]:
    from trl.data_utils import extract_prompt

    return extract_prompt({"chosen": row["chosen"], "rejected": row["rejected"]})


def _same(result: RenderedPair, sides: Any) -> bool:
    chosen, rejected = sides
    return (
        result.chosen_ids.tolist() == chosen.ids
        and result.rejected_ids.tolist() == rejected.ids
        and list(range(result.chosen_start, len(result.chosen_ids))) == chosen.loss_positions
        and list(range(result.rejected_start, len(result.rejected_ids))) == rejected.loss_positions
        and (result.chosen_tokens, result.rejected_tokens) == (len(chosen.loss_positions), len(rejected.loss_positions))
    )


@pytest.fixture(scope="module")
def hh_texts() -> list[str]:
    return [row["chosen"] for row in cases.hh_rows()[:60]]


@pytest.fixture(scope="module")
def hh_plain(hh_texts: list[str]) -> Case:
    pairs = list(open_pairs(cases.HH, format="standard-implicit").read())
    return Case(cases.hh_rows(), pairs, cases.make_tokenizer(hh_texts, None, adds_bos=True))


def _hh_messages(hh_texts: list[str], template: str, limit: int | None = None) -> Case:
    raw = cases.hh_rows()[:limit]
    rows = [{side: cases.hh_to_messages(row[side]) for side in ("chosen", "rejected")} for row in raw]
    return Case(rows, list(open_pairs(cases.HH, limit=limit).read()), cases.make_tokenizer(hh_texts, template))


@pytest.fixture(scope="module")
def hh_chatml(hh_texts: list[str]) -> Case:
    return _hh_messages(hh_texts, cases.CHATML)


@pytest.fixture(scope="module")
def sharegpt_thinking(hh_texts: list[str]) -> Case:
    rows = [cases.sharegpt_to_messages(row) for row in cases.sharegpt_rows()]
    pairs = list(open_pairs(cases.SHAREGPT).read())
    return Case(rows, pairs, cases.make_tokenizer(hh_texts, cases.THINKING, adds_bos=True))


@cases.needs_shared_data
class TestAgainstTrl:
    """All rows of the shared files, through TRL's own code."""

    @pytest.mark.parametrize(("max_length", "truncation", "rows"), LIMITS)
    def test_hh_as_plain_text(self, hh_plain: Case, max_length: int | None, truncation: str, rows: int | None) -> None:
        outcomes, different = hh_plain.mismatches(max_length, truncation, rows)
        assert different == 0, outcomes
        assert outcomes.total() == (rows or 2312)
        assert outcomes["empty_response"] >= (1 if rows else 3)

    @pytest.mark.parametrize(("max_length", "truncation", "rows"), LIMITS)
    def test_hh_as_messages(self, hh_chatml: Case, max_length: int | None, truncation: str, rows: int | None) -> None:
        outcomes, different = hh_chatml.mismatches(max_length, truncation, rows)
        assert different == 0, outcomes
        assert outcomes.total() == (rows or 2312)
        assert (outcomes["prompt_too_long"] > 0) == (max_length == 48 or rows is None)

    @pytest.mark.parametrize(("max_length", "truncation", "rows"), LIMITS)
    def test_sharegpt_with_a_longer_generation_prompt(
        self, sharegpt_thinking: Case, max_length: int | None, truncation: str, rows: int | None
    ) -> None:
        rows = rows and rows // 5
        outcomes, different = sharegpt_thinking.mismatches(max_length, truncation, rows)
        assert different == 0, outcomes
        assert outcomes.total() == (rows or 300)

    def test_hh_with_a_template_that_strips(self, hh_texts: list[str]) -> None:
        outcomes, different = _hh_messages(hh_texts, cases.LLAMA2, SOME).mismatches(512, "keep_start")
        assert different == 0, outcomes

    @pytest.mark.parametrize("template", [cases.CHATML, cases.LLAMA2, cases.THINKING])
    def test_multi_turn_with_implicit_prompt(self, hh_texts: list[str], tmp_path: Any, template: str) -> None:
        rows = [cases.sharegpt_to_messages(row) for row in cases.sharegpt_rows() if len(row["conversations"]) > 2][:20]
        assert len(rows) == 20
        implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
        pairs = open_pairs(_write_jsonl(tmp_path / "implicit.jsonl", implicit))
        assert pairs.format == "conversational-implicit"
        case = Case(implicit, list(pairs.read()), cases.make_tokenizer(hh_texts, template))
        for max_length, truncation, _ in LIMITS:
            outcomes, different = case.mismatches(max_length, truncation)
            assert different == 0, outcomes

    def test_rows_that_trl_drops_are_the_ones_quarantined(self, hh_chatml: Case) -> None:
        kept = trl_reference.prepare(hh_chatml.rows[:100], hh_chatml.tokenizer, max_length=100)
        dropped = set(range(100)) - {entry["row"] for entry in kept}
        results = Renderer(hh_chatml.tokenizer, max_length=100).render(hh_chatml.pairs[:100])
        quarantined = {r.row for r in results if isinstance(r, Quarantined) and r.code == "prompt_too_long"}
        empty = {r.row for r in results if isinstance(r, Quarantined) and r.code == "empty_response"}
        assert dropped and quarantined == dropped - empty

    def test_every_mutation_is_caught(
        self, hh_plain: Case, hh_chatml: Case, sharegpt_thinking: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        boundary = rendering._boundary
        apply_template = rendering.apply_template
        rows = 30

        def differing(case: Case, target: Any, name: str, mutant: Callable[..., Any]) -> int:
            with monkeypatch.context() as patch:
                patch.setattr(target, name, mutant)
                return case.mismatches(1024, "keep_start", rows)[1]

        for case in (hh_plain, hh_chatml, sharegpt_thinking):
            assert case.mismatches(1024, "keep_start", rows)[1] == 0
            for shift in (-1, 1):
                assert differing(case, rendering, "_boundary", lambda *ids, by=shift: boundary(*ids) + by) > 20
        one_side = lambda prompt, chosen, rejected: rendering.common_prefix(prompt, chosen)  # noqa: E731
        assert differing(hh_plain, rendering, "_boundary", one_side) > 0
        no_eos = lambda self, pair: (pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected)  # noqa: E731
        assert differing(hh_plain, Renderer, "_append_eos", no_eos) > 20

        def no_generation_prompt(*texts: Any, **options: Any) -> str:
            return apply_template(*texts, **options | {"generation_prompt": False})

        assert differing(hh_chatml, rendering, "apply_template", no_generation_prompt) > 20

        first_turn = [
            Pair(pair.row, pair.prompt[:1], pair.chosen, pair.rejected) if pair.prompt else pair
            for pair in hh_chatml.pairs
        ]
        with monkeypatch.context() as patch:
            patch.setattr(hh_chatml, "pairs", first_turn)
            assert hh_chatml.mismatches(1024, "keep_start", rows)[1] > 10


def _write_jsonl(path: Any, rows: Sequence[dict[str, Any]]) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class TestSmallCases:
    """Rows written for one rule each, against TRL where TRL takes them."""

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
            {"prompt": "The sky is ", "chosen": "blue.<eos>", "rejected": "green."},
            {"prompt": "", "chosen": "blue.", "rejected": "green."},
            {"chosen": "The cat sat on the mat", "rejected": "The cat sat on the table"},
            {"chosen": "The cat sat", "rejected": "The cat sat on the mat"},
            {"chosen": "The cat sat on", "rejected": "The cat sat"},
            {"chosen": "the cat", "rejected": "a cat"},
        ],
    )
    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_text(self, texts: list[str], tmp_path: Any, row: dict[str, str], adds_bos: bool) -> None:
        name = "standard" if "prompt" in row else "standard-implicit"
        pairs = list(open_pairs(_write_jsonl(tmp_path / "rows.jsonl", [row]), format=name).read())
        case = Case([row], pairs, cases.make_tokenizer(texts, None, adds_bos=adds_bos))
        outcomes, different = case.mismatches(64, "keep_start")
        assert different == 0 and outcomes["ok"] == 1, outcomes

    @pytest.mark.filterwarnings("ignore:This sequence already has </s>")  # ByT5 adds the token that TRL appended
    def test_a_slow_tokenizer(self) -> None:
        tokenizer = ByT5Tokenizer()
        tokenizer.chat_template = cases.CHATML
        rows = [{"prompt": [USER], "chosen": [RED], "rejected": [BLUE]}]
        assert Case(rows, [Pair(0, [USER], [RED], [BLUE])], tokenizer).mismatches(64, "keep_end")[1] == 0
        plain = [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}]
        assert Case(plain, [Pair(0, "The sky is", " blue.", " green.")], tokenizer).mismatches(64, "keep_start")[1] == 0

    @pytest.mark.parametrize("as_text", [True, False])
    def test_tools_and_template_variables(self, texts: list[str], tmp_path: Any, as_text: bool) -> None:
        tools = [{"type": "function", "function": {"name": "paint", "description": "Paint.", "parameters": {}}}]
        row = {"prompt": [USER], "chosen": [RED], "rejected": [BLUE]}
        given = json.dumps(tools) if as_text else tools
        rows = [{**row, "tools": given, "chat_template_kwargs": {"style": "short"}}]
        pairs = list(open_pairs(_write_jsonl(tmp_path / "tools.jsonl", rows)).read())
        case = Case(rows, pairs, cases.make_tokenizer(texts, cases.STRICT))
        assert case.mismatches(None, "keep_start") == (Counter(ok=1), 0)
        (result,) = Renderer(case.tokenizer).render(pairs)
        assert isinstance(result, RenderedPair)
        assert "paint" in case.tokenizer.decode(result.chosen_ids) and "(short)" in case.tokenizer.decode(
            result.chosen_ids
        )

    def test_a_template_given_apart_is_used(self, tokenizer: Any, texts: list[str]) -> None:
        pair = Pair(0, [USER], [RED], [BLUE])
        (other,) = Renderer(tokenizer, chat_template=cases.LLAMA2).render([pair])
        (own,) = Renderer(cases.make_tokenizer(texts, cases.LLAMA2)).render([pair])
        (chatml,) = Renderer(tokenizer).render([pair])
        assert isinstance(other, RenderedPair) and isinstance(own, RenderedPair) and isinstance(chatml, RenderedPair)
        assert other.pair_id == own.pair_id != chatml.pair_id
        assert tokenizer.chat_template == cases.CHATML

    def test_batches_do_not_change_a_row(self, tokenizer: Any) -> None:
        pairs = [Pair(i, [USER], [RED], [{**BLUE, "content": f"Blue {i}" * (1 + i % 5)}]) for i in range(40)]
        pairs[7] = Pair(7, "The sky is", " blue.", " green.")
        pairs[9] = Pair(9, None, "", "", problem="chosen is null")
        renderer = Renderer(tokenizer, max_length=32)
        together = renderer.render(pairs)
        for pair, result in zip(pairs, together, strict=True):
            (alone,) = renderer.render([pair])
            assert type(alone) is type(result)
            if isinstance(alone, RenderedPair) and isinstance(result, RenderedPair):
                assert alone.pair_id == result.pair_id
                np.testing.assert_array_equal(alone.rejected_ids, result.rejected_ids)
        assert together[9] == Quarantined(row=9, source="", reason="malformed_row: chosen is null")
