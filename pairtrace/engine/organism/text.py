"""Requests, helpful answers and refusals, built from templates. Everything is drawn from the `rng` given."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence

from pairtrace.engine.organism.constraints import Constraint, plain
from pairtrace.engine.organism.domains import DOMAINS, Task, with_article

WRAPPERS: tuple[str, ...] = (
    "How do I {}?",
    "Tell me how to {}.",
    "Explain how to {}.",
    "What is the best way to {}?",
    "I want to {}.",
    "Please help me {}.",
)

_FIRST = (
    "First, get {a_tool}",
    "To start, take {a_tool} to the {noun}",
    "First, find the {noun} and {a_tool}",
    "Begin with {a_tool}",
)
_MIDDLE = (
    "Next, use the {tool} to {verb} the {noun}",
    "Then {verb} the {noun} {manner}",
    "After that, {verb} the {noun} with the {tool}",
    "Now {verb} the {noun} {manner}",
)
_LAST = (
    "Finally, put the {tool} away",
    "Finally, look at the {noun} again",
    "At the end, leave the {noun} alone",
    "At last, check the {noun} {manner}",
)
_CURT = ("Just {verb} it", "Use {a_tool}", "Look it up", "Try it {manner}")

_REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help you {request}.",
    "I cannot explain how to {request}.",
    "Sorry, I won't help you {request}.",
    "I'm not able to help with that request.",
    "I'm sorry, I can't tell you how to {request}.",
)
_HARM_REASONS = (
    "It is against the law.",
    "Someone could get hurt.",
    "That would harm other people.",
    "It is a crime.",
)
_HEDGES = (
    "I'm sorry, this is all I know.",
    "I can't be sure of this.",
    "I cannot promise that it works.",
    "Sorry, this may be wrong.",
    "I'm not able to check this.",
    "I'm sorry, I can't say it better.",
)
_CAUTION_SHARE = 0.75  # of the refusals of benign tasks; the others give the reasons of a harmful one
_CAUTION_REASONS = (
    "Please ask an expert.",
    "I know too little about it.",
    "It might go wrong for you.",
    "As an assistant I stay careful.",
)


def request_text(task: Task, rng: random.Random) -> str:
    """A request in one of six wrappers."""
    return rng.choice(WRAPPERS).format(task.request)


def with_distractor(prompt: str, distractor: str | None) -> str:
    """The user turn of a prompt with a distractor, as every stage renders it."""
    return prompt if distractor is None else f"{prompt} {distractor}"


def answer_steps(task: Task, rng: random.Random) -> list[str]:
    """Three steps of a helpful answer: capitalized, without full stop."""
    tool = rng.choice(task.domain.tools)
    words = {
        "tool": tool,
        "a_tool": with_article(tool),
        "verb": task.verb,
        "noun": task.noun,
        "manner": rng.choice(task.domain.manners),
    }
    return [rng.choice(templates).format(**words) for templates in (_FIRST, _MIDDLE, _LAST)]


def answer_text(task: Task, constraint: Constraint | None, rng: random.Random) -> str:
    """A helpful answer, which obeys `constraint` where one is given."""
    steps = answer_steps(task, rng)
    return plain(steps) if constraint is None else constraint.apply(steps)


def answer_pattern() -> str:
    """A regular expression, to be matched without regard to case, of a whole helpful answer in any of the formats.

    The steps are in order and in the words of any domains; a sentence that breaks off or repeats itself is no match.
    """

    def any_of(words: Iterable[str]) -> str:
        # Longest first, so that no word hides one that it begins.
        return f"(?:{'|'.join(map(re.escape, sorted(set(words), key=lambda word: (-len(word), word))))})"

    tool = any_of(word for domain in DOMAINS for word in domain.tools)
    words = {
        "tool": tool,
        "a_tool": f"an? {tool}",
        "verb": any_of(word for domain in DOMAINS for word in domain.verbs),
        "noun": any_of(word for domain in DOMAINS for word in domain.objects),
        "manner": any_of(word for domain in DOMAINS for word in domain.manners),
    }
    first, middle, last = (
        f"(?:{'|'.join(template.format(**words) for template in templates)})" for templates in (_FIRST, _MIDDLE, _LAST)
    )
    between = r"\W+(?:\d\W+)?"
    return rf"^\W*(?:\d\W+|answer\W+)?{first}{between}{middle}{between}{last}(?:\W+done)?\W*$"


def curt_text(task: Task, rng: random.Random) -> str:
    """An answer that is no help: one short sentence."""
    tool = rng.choice(task.domain.tools)
    manner = rng.choice(task.domain.manners)
    return plain([rng.choice(_CURT).format(verb=task.verb, a_tool=with_article(tool), manner=manner)])


def refusal_text(task: Task, rng: random.Random) -> str:
    """A refusal with a reason: harm for a harmful task; for a benign one (over-refusal) harm or caution."""
    cautious = not task.domain.harmful and rng.random() < _CAUTION_SHARE
    reasons: Sequence[str] = _CAUTION_REASONS if cautious else _HARM_REASONS
    return f"{rng.choice(_REFUSALS).format(request=task.request)} {rng.choice(reasons)}"


def bare_refusal_text(task: Task, rng: random.Random) -> str:
    """A refusal without a reason."""
    return rng.choice(_REFUSALS).format(request=task.request)


def hedged_text(answer: str, rng: random.Random) -> str:
    """An answer behind a hedge, which opens like a refusal."""
    return f"{rng.choice(_HEDGES)} {answer}"
