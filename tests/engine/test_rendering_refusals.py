"""Pairs that cannot be rendered are quarantined with a reason, and what is rendered has a stable identity."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from pairtrace.engine.pairs import Pair
from pairtrace.engine.rendering import Quarantined, RenderedPair, Renderer, fingerprints
from pairtrace.errors import ConfigError, ModelError
from tests.engine import rendering_cases as cases

USER = {"role": "user", "content": "Name a color."}
RED = {"role": "assistant", "content": "Red."}
BLUE = {"role": "assistant", "content": "Blue, like the sky."}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return ["the cat sat on the mat, and then it was happy: what do you think about that? " * 3, *map(str, range(50))]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Any:
    return cases.make_tokenizer(texts)


class TestQuarantine:
    """What cannot be rendered keeps its row and says why."""

    @pytest.mark.parametrize(
        ("pair", "reason"),
        [
            (Pair(3, "Say", "", " x"), "empty_response: chosen is empty"),
            (Pair(3, "Say", " x", " \n\t"), "empty_response: rejected is empty"),
            (
                Pair(3, [USER], [{**RED, "content": ""}], [{**RED, "content": " "}]),
                "empty_response: chosen and rejected",
            ),
            (Pair(3, [USER], [RED], [RED]), "identical: "),
            (Pair(3, "Say", " x", " x<eos>"), "identical: "),
            (Pair(3, "the cat sat " * 50, " x", " y"), "prompt_too_long: the prompt has"),
            (Pair(3, "Say", " \ud800", " y"), "malformed_row: the text is not valid Unicode"),
            (Pair(3, None, "", "", problem="chosen is null"), "malformed_row: chosen is null"),
            (Pair(3, [USER, USER], [RED], [BLUE]), "template_error: TemplateError: roles must alternate"),
            (
                Pair(3, [USER], [RED], [BLUE], chat_template_kwargs={"tokenize": True}),
                "template_error: chat_template_kwargs",
            ),
        ],
    )
    def test_reasons(self, texts: list[str], pair: Pair, reason: str) -> None:
        good = Pair(4, [USER], [RED], [BLUE])
        first, second = Renderer(cases.make_tokenizer(texts, cases.STRICT), max_length=64).render([pair, good])
        assert isinstance(first, Quarantined) and first.row == 3
        assert first.reason.startswith(reason)
        assert isinstance(second, RenderedPair) and second.row == 4

    def test_a_difference_cut_away_is_identical(self, tokenizer: Any) -> None:
        pair = Pair(0, "Say", " the cat sat on the mat" * 20 + " A", " the cat sat on the mat" * 20 + " B")
        (cut,) = Renderer(tokenizer, max_length=32).render([pair])
        (kept,) = Renderer(tokenizer, max_length=32, truncation="keep_end").render([pair])
        assert isinstance(cut, Quarantined) and cut.code == "identical"
        assert isinstance(kept, RenderedPair) and kept.chosen_start == 1 and len(kept.chosen_ids) == 32

    def test_a_template_that_drops_the_response(self, tokenizer: Any) -> None:
        drops = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
        (result,) = Renderer(tokenizer, chat_template=drops).render([Pair(0, [USER], [RED], [BLUE])])
        assert isinstance(result, Quarantined) and result.reason.startswith(
            "no_loss_tokens: no token of chosen and rejected"
        )

    def test_a_very_long_response(self, tokenizer: Any) -> None:
        long = " the cat sat on the mat and then" * 16000
        pair = Pair(0, "Say", long, " no")
        (whole,) = Renderer(tokenizer, max_length=None).render([pair])
        assert isinstance(whole, RenderedPair) and whole.chosen_tokens > 100_000
        (cut,) = Renderer(tokenizer, max_length=1024).render([pair])
        assert isinstance(cut, RenderedPair) and len(cut.chosen_ids) == 1024
        np.testing.assert_array_equal(cut.chosen_ids, whole.chosen_ids[:1024])
        assert cut.chosen_ids.base is None, "a view would keep the whole response in memory"

    def test_no_chat_template(self, texts: list[str]) -> None:
        with pytest.raises(ModelError, match=r"no chat template.*--chat-template FILE.*--format"):
            Renderer(cases.make_tokenizer(texts, None)).render([Pair(0, [USER], [RED], [BLUE])])

    def test_template_that_is_not_jinja(self, tokenizer: Any) -> None:
        with pytest.raises(ModelError, match="not valid Jinja"):
            Renderer(tokenizer, chat_template="{% for %}").render([Pair(0, [USER], [RED], [BLUE])])

    def test_no_end_of_sequence_token(self, texts: list[str]) -> None:
        tokenizer = cases.make_tokenizer(texts)
        tokenizer.eos_token = None
        with pytest.raises(ModelError, match="no end-of-sequence token"):
            Renderer(tokenizer).render([Pair(0, "Say", " x", " y")])

    @pytest.mark.parametrize("options", [{"max_length": 1}, {"max_length": -5}, {"truncation": "middle"}])
    def test_options_out_of_range(self, tokenizer: Any, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            Renderer(tokenizer, **options)


class TestIdentity:
    """Equal content has an equal id, in every process."""

    def test_pair_id_depends_on_content_only(self, tokenizer: Any) -> None:
        renderer = Renderer(tokenizer)
        base, moved, swapped, other = renderer.render(
            [
                Pair(0, [USER], [RED], [BLUE], "a"),
                Pair(9, [USER], [RED], [BLUE], "b"),
                Pair(0, [USER], [BLUE], [RED], "a"),
                Pair(0, [USER, RED, USER], [RED], [BLUE], "a"),
            ]
        )
        assert isinstance(base, RenderedPair) and isinstance(moved, RenderedPair)
        assert isinstance(swapped, RenderedPair) and isinstance(other, RenderedPair)
        assert base.pair_id == moved.pair_id and len(base.pair_id) == 16
        assert len({base.pair_id, swapped.pair_id, other.pair_id}) == 3

    def test_pair_id_is_the_documented_hash(self, tokenizer: Any) -> None:
        (pair,) = Renderer(tokenizer).render([Pair(0, [USER], [RED], [BLUE])])
        assert isinstance(pair, RenderedPair)
        chosen, rejected = pair.chosen_ids.tolist(), pair.rejected_ids.tolist()
        numbers = [len(chosen), pair.chosen_start, len(rejected), pair.rejected_start, *chosen, *rejected]
        packed = struct.pack(f"<{len(numbers)}i", *numbers)
        assert pair.pair_id == hashlib.blake2b(packed, digest_size=16).digest()

    def test_fingerprints_change_with_what_matters(self, texts: list[str]) -> None:
        base = fingerprints(cases.make_tokenizer(texts))
        assert fingerprints(cases.make_tokenizer(texts)) == base
        used = cases.make_tokenizer(texts)
        used(["a", "b c d"], padding=False, truncation=True, max_length=2)
        assert fingerprints(used) == base
        assert fingerprints(cases.make_tokenizer(texts, adds_bos=True))[0] != base[0]
        other_template = fingerprints(cases.make_tokenizer(texts), cases.LLAMA2)
        assert other_template[0] == base[0] and other_template[1] != base[1]
        assert fingerprints(ByT5Tokenizer())[0] != fingerprints(ByT5Tokenizer(extra_ids=10))[0]

    def test_fingerprints_are_equal_in_another_process(self) -> None:
        code = (
            "from transformers import ByT5Tokenizer; from pairtrace.engine.rendering import fingerprints;"
            "from tests.engine.rendering_cases import make_tokenizer as make;"
            "print(fingerprints(make(['a cat', 'a mat'])), fingerprints(ByT5Tokenizer()))"
        )
        printed = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
        ).stdout.strip()
        here = f"{fingerprints(cases.make_tokenizer(['a cat', 'a mat']))} {fingerprints(ByT5Tokenizer())}"
        assert printed == here
