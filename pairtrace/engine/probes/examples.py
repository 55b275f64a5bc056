"""Examples: mean response activations of two classes, each with its prompt.

Legend: n examples, m some of them, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pairtrace.errors import ExamplesError

Block = tuple[np.ndarray, np.ndarray]
"""Positions of some examples, int64 [m], and their activations, float32 [m, D], finite."""


def reasons_text(counts: Mapping[str, int]) -> str:
    """What was left out and why, as messages tell it; "" for nothing."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What activations were read with.

    Attributes:
        name: store or rollouts file, for messages.
        model_fingerprint, tokenizer_fingerprint, template_fingerprint: as in direction files.
        description: where the examples came from, plain JSON values.
    """

    name: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def prints(self) -> dict[str, str]:
        """The fingerprints by name."""
        names = ("model_fingerprint", "tokenizer_fingerprint", "template_fingerprint")
        return {name: getattr(self, name) for name in names}


class Examples(Protocol):
    """n labelled examples at some layers.

    Attributes:
        labels: int8 [n], class 0 or 1.
        prompts: int64 [n], number of the prompt, from 0 on without gaps.
        contents: uint64 [n], digest of the prompt's content; several may belong to one prompt (with and without its
            distractor).
        layers: that can be read, ascending.
        width: D.
        origin: what they were read with.
        left_out: what could not be used, by reason.
    """

    labels: np.ndarray
    prompts: np.ndarray
    contents: np.ndarray
    layers: tuple[int, ...]
    width: int
    origin: Origin
    left_out: dict[str, int]

    def blocks(self, layer: int) -> Iterator[Block]:
        """All examples, each once, in any order that is the same each time.

        Raises:
            ExamplesError: activations are not finite.
        """


def require_finite(rows: np.ndarray, name: Callable[[int], str], layer: int, where: str) -> None:
    """Check activations, float [m, D]; `name` gives what to call the one in a place.

    Raises:
        ExamplesError: one holds NaN or infinity.
    """
    # A sum is finite only if all its terms are; the reverse fails by overflow alone, which the second look settles.
    with np.errstate(over="ignore", invalid="ignore"):
        suspect = np.flatnonzero(~np.isfinite(rows.sum(axis=1)))
    for place in suspect.tolist():
        broken = np.flatnonzero(~np.isfinite(rows[place]))
        if broken.size:
            raise ExamplesError(
                f"{where}: {name(place)} is not finite at layer {layer}, column {broken[0]}",
                "finite activations",
                float(rows[place, broken[0]]),
            )


def content_digest(prompt: Any) -> int:
    """64 bits of a prompt's content, text or messages: the same in every process."""
    text = json.dumps(prompt, sort_keys=True, ensure_ascii=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def label_of(value: Any, where: str) -> int | None:
    """A class out of a column: 1, 0, or None where there is none.

    Raises:
        ExamplesError: it is something else.
    """
    if value is None or value != value:  # noqa: PLR0124 - NaN is how pandas writes a missing label
        return None
    if isinstance(value, bool | int | float) and value in (0, 1):
        return int(value)
    raise ExamplesError(f"{where} is no label", "true or 1, false or 0, or nothing", repr(value))


def numbered(keys: Sequence[Any]) -> np.ndarray:
    """int64 [n], from 0 on in order of appearance: equal keys, equal numbers."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
