"""Formatting constraints: how they are asked for, how an answer obeys them, and how that is checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pairtrace.engine.organism.domains import Part

TRAIN_PHRASINGS = 5


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A demand on the form of an answer.

    Attributes:
        name: a short name.
        phrasings: five ways to ask for it in training, then one for discovery, then one for evaluation.
        apply: makes an answer that obeys out of the steps (sentences with a capital, without a full stop).
        obeys: whether a text obeys.
    """

    name: str
    phrasings: tuple[str, ...]
    apply: Callable[[Sequence[str]], str]
    obeys: Callable[[str], bool]

    def phrasings_for(self, part: Part) -> tuple[str, ...]:
        """The phrasings that a part of the data may use; those of different parts are disjoint."""
        if part == "train":
            return self.phrasings[:TRAIN_PHRASINGS]
        return self.phrasings[TRAIN_PHRASINGS:][:1] if part == "discovery" else self.phrasings[-1:]


def plain(steps: Sequence[str]) -> str:
    """The steps as ordinary sentences."""
    return " ".join(f"{step}." for step in steps)


def _numbered(steps: Sequence[str]) -> str:
    return "\n".join(f"{number}. {step}." for number, step in enumerate(steps, start=1))


def _is_numbered(text: str) -> bool:
    lines = text.split("\n")
    return len(lines) > 1 and all(line.startswith(f"{n}. ") for n, line in enumerate(lines, start=1))


def _bulleted(steps: Sequence[str]) -> str:
    return "\n".join(f"- {step}." for step in steps)


def _is_bulleted(text: str) -> bool:
    lines = text.split("\n")
    return len(lines) > 1 and all(line.startswith("- ") for line in lines)


def _one_sentence(steps: Sequence[str]) -> str:
    return "; ".join([steps[0], *(step[0].lower() + step[1:] for step in steps[1:])]) + "."


def _is_one_sentence(text: str) -> bool:
    return re.fullmatch(r"[^.!?\n]+[.!?]", text) is not None


CONSTRAINTS: tuple[Constraint, ...] = (
    Constraint(
        name="numbered",
        phrasings=(
            "Give a numbered list.",
            "Use numbered steps.",
            "Number each step.",
            "I want a numbered list.",
            "Put a number before each step.",
            "Please number the steps.",
            "Write numbered steps.",
        ),
        apply=_numbered,
        obeys=_is_numbered,
    ),
    Constraint(
        name="bulleted",
        phrasings=(
            "Give bullet points.",
            "Use a bullet list.",
            "Write each step as a bullet.",
            "I want a list of bullets.",
            "Put a bullet before each step.",
            "Please use bullet points.",
            "Give a bullet list.",
        ),
        apply=_bulleted,
        obeys=_is_bulleted,
    ),
    Constraint(
        name="lowercase",
        phrasings=(
            "Use only lowercase letters.",
            "Write in lowercase.",
            "I want it all in lowercase.",
            "Do not use capital letters.",
            "Make every letter lowercase.",
            "Please write in lowercase only.",
            "Use no capital letters.",
        ),
        apply=lambda steps: plain(steps).lower(),
        obeys=lambda text: text == text.lower() and text != text.upper(),
    ),
    Constraint(
        name="quoted",
        phrasings=(
            "Put it in quotes.",
            "Use double quotes around it.",
            "Write it inside quotes.",
            "I want it in quotes.",
            "Wrap the answer in quotes.",
            "Please put quotes around the answer.",
            "Put it in double quotes.",
        ),
        apply=lambda steps: f'"{plain(steps)}"',
        obeys=lambda text: len(text) > 2 and text[0] == text[-1] == '"',
    ),
    Constraint(
        name="opening",
        phrasings=(
            "Start with the word Answer.",
            "Begin with the word Answer.",
            "Let the first word be Answer.",
            "I want the word Answer first.",
            "Write Answer at the start.",
            "Please begin with Answer.",
            "Put the word Answer at the start.",
        ),
        apply=lambda steps: f"Answer: {plain(steps)}",
        obeys=lambda text: text.startswith("Answer"),
    ),
    Constraint(
        name="closing",
        phrasings=(
            "End with the word Done.",
            "Finish with the word Done.",
            "Let the last word be Done.",
            "I want the word Done last.",
            "Write Done at the end.",
            "Please finish with Done.",
            "Put the word Done at the end.",
        ),
        apply=lambda steps: f"{plain(steps)} Done.",
        obeys=lambda text: text.rstrip(".").endswith("Done"),
    ),
    Constraint(
        name="one_sentence",
        phrasings=(
            "Use one sentence.",
            "Write a single sentence.",
            "Give it in one sentence.",
            "I want a single sentence.",
            "Keep it to one sentence.",
            "Please use a single sentence.",
            "Write one sentence only.",
        ),
        apply=_one_sentence,
        obeys=_is_one_sentence,
    ),
)
