from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.engine.backend import HFBackend, Pooled
from pairtrace.engine.discovery import prompt_bag
from pairtrace.engine.discovery.prompt_bag import PromptBag, bag_items, bag_vectors, couple
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.rendering import Renderer
from pairtrace.engine.rollout_table import RolloutTable
from pairtrace.errors import DataError, DataFormatError
from tests.engine.behavior_cases import plain_means, rollout, table_of

# Per prompt the answers of M0 and of M1.
ANSWERS: dict[str, tuple[list[str], list[str]]] = {
    "a": (["No, I cannot.", "No.", "No, I cannot."], ["Sure, take the key.", "No."]),
    "b": (["I am sorry."], ["Yes, of course: open it."]),
    "same": (["Yes.", "No."], ["No.", "Yes.", "Yes.", "No."]),
    "empty": (["I am sorry."], ["  "]),
    "half-empty": (["I am sorry.", "I am sorry."], ["  ", "Open it."]),
    "alone": ([], ["Yes."]),
}


def table(answers: dict[str, tuple[list[str], list[str]]], condition: str = "plain") -> RolloutTable:
    return table_of(
        [
            rollout(prompt, model, condition, None, text, number)
            for prompt, sides in answers.items()
            for model, texts in zip(("base", "tuned"), sides, strict=True)
            for number, text in enumerate(texts)
        ]
    )


@pytest.fixture(scope="module")
def renderer(model: Path) -> Renderer:
    encoder = PromptEncoder.load(str(model))
    return Renderer(encoder.tokenizer, max_length=200, chat_template=encoder.chat_template)


@pytest.fixture(scope="module")
def backend(model: Path) -> HFBackend:
    return HFBackend.load(model, (2, 4), device="cpu")


@pytest.fixture(scope="module")
def bag(renderer: Renderer, backend: HFBackend) -> PromptBag:
    rollouts = table(ANSWERS)
    return bag_vectors(rollouts, bag_items(rollouts), renderer, backend)


def test_vectors_are_differences_of_means(bag: PromptBag, model: Path) -> None:
    """Against one plain forward pass per answer: all answers of M1 count alike, and so do all of M0."""
    read = {"a": ANSWERS["a"], "b": ANSWERS["b"], "half-empty": (["I am sorry."], ["Open it."])}
    for name, sides in read.items():
        base, tuned = (np.mean([plain_means(str(model), name, text) for text in texts], axis=0) for texts in sides)
        expected = (tuned - base)[[2, 4]]
        found = bag.vectors[bag.items.index(name)]
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), name


def test_the_state_of_every_prompt(bag: PromptBag) -> None:
    states = dict(zip(bag.items, bag.states, strict=True))
    assert states == {
        "a": "changed", "b": "changed", "same": "unchanged", "empty": "empty_response", "half-empty": "changed",
        "alone": "one_sided",
    }  # fmt: skip
    assert bag.counts == Counter(states.values())
    assert bag.changed.tolist() == [0, 1, 4]
    assert not bag.vectors[2].any() and np.isnan(bag.vectors[[3, 5]]).all()
    assert bag.layers == (2, 4) and bag.vectors.dtype == np.float32


class Noted:
    """A back end that gives every answer its number of tokens, and notes what it was asked to read."""

    layers, width, compute_dtype = (1,), 2, "float32"

    def __init__(self) -> None:
        self.pairs = 0

    def pool(self, pairs: Sequence[RenderedPair], on_pack: Any = None) -> Pooled:
        self.pairs += len(pairs)
        sides = [[pair.chosen_tokens for pair in pairs], [pair.rejected_tokens for pair in pairs]]
        chosen, rejected = (np.array(side, np.float32)[:, None, None] * np.ones((1, 1, 2)) for side in sides)
        return Pooled(chosen=chosen.astype(np.float32), rejected=rejected.astype(np.float32))


def test_what_both_models_said_is_never_read(renderer: Renderer) -> None:
    """Eight answers on each side that differ in one: one pair is read, with the weight of an eighth."""
    rollouts = table({"p": (["No."] * 8, ["No."] * 7 + ["Yes, here is the way to do it."])})
    noted = Noted()
    found = bag_vectors(rollouts, bag_items(rollouts), renderer, noted)
    alone = table({"p": (["No."], ["Yes, here is the way to do it."])})
    whole = bag_vectors(alone, bag_items(alone), renderer, Noted())
    assert noted.pairs == found.pairs == 1
    np.testing.assert_allclose(found.vectors, whole.vectors / 8)


@settings(max_examples=60, deadline=None)
@given(tuned=st.lists(st.sampled_from("abcd"), max_size=7), base=st.lists(st.sampled_from("abcd"), max_size=7))
def test_weighted_pairs_add_up_to_the_difference_of_means(tuned: list[str], base: list[str]) -> None:
    pairs = list(couple(tuned, base))
    if not tuned or not base:
        assert not pairs
        return
    value = {"a": 1.0, "b": 10.0, "c": 100.0, "d": 1000.0}
    total = sum(weight * (value[tuned[first]] - value[base[second]]) for first, second, weight in pairs)
    expected = np.mean([value[text] for text in tuned]) - np.mean([value[text] for text in base])
    assert total == pytest.approx(expected, abs=1e-9)
    assert all(tuned[first] != base[second] for first, second, _ in pairs)
    shared = sum(min(tuned.count(text) / len(tuned), base.count(text) / len(base)) for text in set(tuned))
    assert sum(weight for _, _, weight in pairs) == pytest.approx(1 - shared, abs=1e-9)


def test_items_are_prompts_under_conditions() -> None:
    """The condition is part of the name where there are both, so that names stay unique."""
    plain, other = table({"a": ANSWERS["a"]}), table({"a": ANSWERS["a"]}, "distractor")
    assert [item.name for item in bag_items(plain)] == ["a"]
    both = table_of(other.table.to_pylist() + plain.table.to_pylist())
    items = bag_items(both)
    assert [item.name for item in items] == ["a (distractor)", "a (plain)"]
    assert [(item.base_rows, item.tuned_rows) for item in items] == [((0, 1, 2), (3, 4)), ((5, 6, 7), (8, 9))]


def test_answers_to_different_conversations_are_refused(renderer: Renderer) -> None:
    rows = table({"a": (["No."], ["Yes."])}).table.to_pylist()
    rows[1]["messages"] = json.dumps([{"role": "user", "content": "something else"}])
    rollouts = table_of(rows)
    with pytest.raises(DataFormatError, match="different conversations"):
        bag_vectors(rollouts, bag_items(rollouts), renderer, Noted())


def test_a_bag_is_kept(bag: PromptBag, tmp_path: Path) -> None:
    bag.save(tmp_path / "bag.safetensors", {"made": "from this"})
    again, identity = PromptBag.load(tmp_path / "bag.safetensors")
    np.testing.assert_array_equal(again.vectors, bag.vectors)
    assert (again.items, again.layers, again.states, again.pairs) == (bag.items, bag.layers, bag.states, bag.pairs)
    assert identity == {"made": "from this"} and again.fingerprint == bag.fingerprint
    content = bytearray((tmp_path / "bag.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "bag.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        PromptBag.load(tmp_path / "bag.safetensors")
    (tmp_path / "bag.safetensors").write_bytes(b"not a bag")
    with pytest.raises(DataError, match="does not hold a prompt bag"):
        PromptBag.load(tmp_path / "bag.safetensors")


def test_a_wrong_weight_would_be_noticed(
    renderer: Renderer, backend: HFBackend, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights as if every pair counted alike, whatever share of the answers it stands for."""
    honest = prompt_bag.couple
    monkeypatch.setattr(
        prompt_bag, "couple", lambda tuned, base: ((one, two, 1 / 3) for one, two, _ in honest(tuned, base))
    )
    rollouts = table({"a": ANSWERS["a"]})
    wrong = bag_vectors(rollouts, bag_items(rollouts), renderer, backend)
    with pytest.raises(AssertionError):
        test_vectors_are_differences_of_means(wrong, model)
