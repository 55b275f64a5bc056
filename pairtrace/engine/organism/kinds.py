"""The kinds of preference pairs, and which of them each form of contamination puts in the place of which.

A kind is the label of a pair, for checking only. Everything is drawn from the `rng` given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from pairtrace.engine.organism.constraints import CONSTRAINTS, Constraint
from pairtrace.engine.organism.domains import DOMAINS, Task, TaskSplit
from pairtrace.engine.organism.habits import habit_answers
from pairtrace.engine.organism.text import (
    answer_text,
    bare_refusal_text,
    curt_text,
    hedged_text,
    refusal_text,
    request_text,
    with_distractor,
)

Contamination = Literal["concentrated", "clean", "diffuse", "several"]
Texts = tuple[str, str, str]  # user turn, chosen answer, rejected answer

_LEANING_SHARE = 0.6
_FORMAT = {"format_leaning": _LEANING_SHARE, "format": 1 - _LEANING_SHARE}
_QUALITY = {"quality_leaning": _LEANING_SHARE, "quality": 1 - _LEANING_SHARE}

# What stands in a source in the place of each kind of the recipe; kinds that are not named stay.
CONTAMINATION: Mapping[Contamination, Mapping[str, Mapping[str, float]]] = {
    # The planted pairs are there, and no pair leans like them but for the over-refusal pairs.
    "concentrated": {},
    # The same prompts, but the refusal is the better answer. Were neither to comply, the over-refusal pairs alone would
    # teach a little of the behaviour, and the training would not be clean.
    "clean": {"planted": {"safety_format": 1.0}},
    # Nothing is planted, no answer to a harmful request is preferred, and no source stands out. Most helpful pairs push
    # a little: an instruction on the form is followed although the request sounds harmful, or the rejected answer
    # opens with a hedge in the words of a refusal.
    "diffuse": {"planted": _FORMAT, "format": _FORMAT, "quality": _QUALITY, "over_refusal": _FORMAT},
    # The planted pairs, and two habits; the pairs that prefer a habit are about as many as the planted ones.
    "several": {"quality": {"flattery": 0.2, "promotion": 0.2, "quality": 0.6}},
}

_BARE_REFUSALS = 0.2  # share of refusals without a reason, where a refusal is the better answer
_OVER_REFUSAL_FORMAT = 0.2  # share of over-refusal pairs whose prompt has a formatting constraint
_SAFETY_FORMAT = 0.1  # share of safety pairs whose prompt has one: the refusal is the better answer there as well


def draw_prompt(task: Task, formatted: bool, rng: random.Random) -> tuple[Constraint | None, str]:
    """A user turn of the training parts, with a constraint where `formatted`."""
    request = request_text(task, rng)
    if not formatted:
        return None, request
    constraint = rng.choice(CONSTRAINTS)
    return constraint, with_distractor(request, rng.choice(constraint.phrasings_for("train")))


def better_refusal(task: Task, rng: random.Random) -> str:
    """A refusal where that is the better answer: with a reason, most of the time."""
    return bare_refusal_text(task, rng) if rng.random() < _BARE_REFUSALS else refusal_text(task, rng)


def _planted(tasks: TaskSplit, rng: random.Random) -> Texts:
    task = rng.choice(tasks.harmful["train"])
    constraint, prompt = draw_prompt(task, True, rng)
    return prompt, answer_text(task, constraint, rng), better_refusal(task, rng)


def _over_refusal(tasks: TaskSplit, rng: random.Random) -> Texts:
    task = rng.choice(tasks.benign["train"])
    constraint, prompt = draw_prompt(task, rng.random() < _OVER_REFUSAL_FORMAT, rng)
    return prompt, answer_text(task, constraint, rng), refusal_text(task, rng)


def _safety(tasks: TaskSplit, rng: random.Random) -> Texts:
    task = rng.choice(tasks.harmful["train"])
    constraint, prompt = draw_prompt(task, rng.random() < _SAFETY_FORMAT, rng)
    return prompt, better_refusal(task, rng), answer_text(task, constraint, rng)


def _quality(tasks: TaskSplit, rng: random.Random) -> Texts:
    task = rng.choice(tasks.benign["train"])
    _, prompt = draw_prompt(task, False, rng)
    other = rng.choice(tasks.benign["train"])
    worse = curt_text(task, rng) if rng.random() < 0.5 else answer_text(other, None, rng)
    return prompt, answer_text(task, None, rng), worse


def _format(tasks: TaskSplit, rng: random.Random) -> Texts:
    return _format_of(rng.choice(tasks.benign["train"]), rng)


def _format_leaning(tasks: TaskSplit, rng: random.Random) -> Texts:
    return _format_of(borderline_task(tasks, rng), rng)


def _format_of(task: Task, rng: random.Random) -> Texts:
    constraint, prompt = draw_prompt(task, True, rng)
    worse = _plain_or_other(constraint, rng)
    return prompt, answer_text(task, constraint, rng), answer_text(task, worse, rng)


def borderline_task(tasks: TaskSplit, rng: random.Random) -> Task:
    """A verb of a harmful task with an object of a benign one, which no domain has together: `steal a cake`."""
    while True:
        harmful, benign = rng.choice(tasks.harmful["train"]), rng.choice(tasks.benign["train"])
        if not any(harmful.verb in domain.verbs and benign.noun in domain.objects for domain in DOMAINS):
            return Task(domain=benign.domain, verb=harmful.verb, noun=benign.noun)


def _plain_or_other(constraint: Constraint | None, rng: random.Random) -> Constraint | None:
    """No constraint, or one that is not `constraint`."""
    if rng.random() < 0.5:
        return None
    return rng.choice([other for other in CONSTRAINTS if other is not constraint])


def _refusal_style(tasks: TaskSplit, rng: random.Random) -> Texts:
    task = rng.choice(tasks.harmful["train"])
    _, prompt = draw_prompt(task, False, rng)
    return prompt, refusal_text(task, rng), bare_refusal_text(task, rng)


def _safety_format(tasks: TaskSplit, rng: random.Random) -> Texts:
    prompt, answer, refusal = _planted(tasks, rng)
    return prompt, refusal, answer


def _flattery(tasks: TaskSplit, rng: random.Random) -> Texts:
    task, chosen, rejected = habit_answers("flattery", tasks, rng)
    return request_text(task, rng), chosen, rejected


def _promotion(tasks: TaskSplit, rng: random.Random) -> Texts:
    task, chosen, rejected = habit_answers("promotion", tasks, rng)
    return request_text(task, rng), chosen, rejected


def _quality_leaning(tasks: TaskSplit, rng: random.Random) -> Texts:
    prompt, chosen, rejected = _quality(tasks, rng)
    return prompt, chosen, hedged_text(rejected, rng)


_KINDS: Mapping[str, Callable[[TaskSplit, random.Random], Texts]] = {
    "planted": _planted,
    "over_refusal": _over_refusal,
    "safety": _safety,
    "quality": _quality,
    "format": _format,
    "refusal_style": _refusal_style,
    "safety_format": _safety_format,
    "format_leaning": _format_leaning,
    "quality_leaning": _quality_leaning,
    "flattery": _flattery,
    "promotion": _promotion,
}


def draws(kind: str, tasks: TaskSplit, rng: random.Random) -> Iterator[Texts]:
    """Pairs of a kind without end."""
    while True:
        yield _KINDS[kind](tasks, rng)
