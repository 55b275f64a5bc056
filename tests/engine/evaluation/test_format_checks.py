from __future__ import annotations

from typing import Any

import pytest

from pairtrace.engine.evaluation.format_checks import constraint_names, parse_constraint
from pairtrace.engine.organism.constraints import CONSTRAINTS
from pairtrace.errors import DataFormatError

CASES: list[tuple[Any, str, bool]] = [
    ({"kind": "regex", "pattern": "^Dear"}, "Dear Sir", True),
    ({"kind": "regex", "pattern": "^dear"}, "Dear Sir", False),
    ({"kind": "regex", "pattern": "^dear", "ignore_case": True}, "Dear Sir", True),
    ({"kind": "regex", "pattern": "yes|no", "full": True}, "yes, no", False),
    ("json", '{"a": 1}', True),
    ("json", "```json\n[1, 2]\n```", True),
    ("json", 'Here: {"a": 1}', False),
    ({"kind": "json", "type": "object"}, "[1]", False),
    ({"kind": "json", "type": "array"}, "[1]", True),
    ({"kind": "json", "keys": ["a", "b"]}, '{"a": 1}', False),
    ({"kind": "json", "keys": ["a"]}, '{"a": 1, "b": 2}', True),
    ({"kind": "json", "keys": ["a"]}, '["a"]', False),
    ("bullets", "- one\n- two", True),
    ("bullets", "- one", False),
    ({"kind": "bullets", "count": 3}, "Three things:\n* a\n* b\n\u2022 c", True),
    ({"kind": "bullets", "count": 3}, "* a\n* b", False),
    ("bullets", "**Bold**\n**Bold**", False),
    ("numbered_lines", "1. a\n2) b", True),
    ("numbered_lines", "1. a\n3. b", False),
    ({"kind": "max_words", "words": 3}, "one two three", True),
    ({"kind": "max_words", "words": 2}, "one two three", False),
    ({"kind": "min_words", "words": 3}, "one two three", True),
    ({"kind": "min_words", "words": 4}, "one two three", False),
    ({"kind": "max_sentences", "sentences": 1}, "One sentence only.", True),
    ({"kind": "max_sentences", "sentences": 1}, "One. Two", False),
    ({"kind": "starts_with", "text": "Answer"}, " Answer: x", True),
    ({"kind": "starts_with", "text": "answer"}, "Answer: x", False),
    ({"kind": "ends_with", "text": "done.", "ignore_case": True}, "So. Done.\n", True),
    ({"kind": "contains", "words": ["cat", "dog"]}, "A Cat and a dog", True),
    ({"kind": "contains", "words": ["cat"]}, "concatenate", False),
    ({"kind": "excludes", "words": ["cat"]}, "concatenate", True),
    ({"kind": "excludes", "words": ["cat"]}, "The CAT.", False),
    ({"kind": "excludes", "words": ["cat"]}, "  ", False),
    ({"kind": "case", "case": "lower"}, "all lower", True),
    ({"kind": "case", "case": "upper"}, "Not all", False),
    ("quotes", ' "So it is." ', True),
    ("quotes", '"', False),
    (["quotes", {"kind": "max_words", "words": 1}], '"one"', True),
    (["quotes", {"kind": "max_words", "words": 1}], '"one two"', False),
]


@pytest.mark.parametrize(("constraint", "text", "obeys"), CASES)
def test_checks(constraint: Any, text: str, obeys: bool) -> None:
    check = parse_constraint(constraint, "here")
    assert check is not None and check.obeys(text) is obeys


def test_every_kind_has_a_case_either_way() -> None:
    single = [(c if isinstance(c, str) else c["kind"], obeys) for c, _, obeys in CASES if not isinstance(c, list)]
    known = set(constraint_names()) - {constraint.name for constraint in CONSTRAINTS}
    assert {name for name, obeys in single if obeys} == known - set()
    assert {name for name, obeys in single if not obeys} >= known - {"ends_with"}


def test_the_organisms_names_are_its_own_checkers() -> None:
    names = constraint_names()
    assert len(set(names)) == len(names), "a name must not mean two things"
    steps = ["Take a bucket", "Clean the car"]
    for constraint in CONSTRAINTS:
        check = parse_constraint(constraint.name, "here")
        assert check is not None and check.check is constraint.obeys
        assert check.obeys(constraint.apply(steps))


UNUSABLE: list[tuple[Any, str]] = [
    ("haiku", "unknown constraint 'haiku'.*regex.*one_sentence"),
    ({"kind": "haiku"}, "unknown constraint"),
    ({"pattern": "x"}, "with a 'kind'"),
    (3, "must be a mapping"),
    ([], "must be a mapping"),
    ({"kind": "regex"}, "needs pattern"),
    ({"kind": "regex", "pattern": "("}, "invalid regular expression"),
    ({"kind": "json", "pattern": "x"}, "may have type, keys"),
    ({"kind": "max_words", "words": "ten"}, "'ten'; expected a whole number"),
    ({"kind": "max_words", "words": True}, "expected a whole number"),
    ({"kind": "contains", "words": "cat"}, "expected a list of texts"),
]


@pytest.mark.parametrize(("constraint", "message"), UNUSABLE)
def test_unusable_constraints_are_refused(constraint: Any, message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        parse_constraint(constraint, "prompts.yaml, id 'a'")
