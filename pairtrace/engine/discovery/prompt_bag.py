"""A bag of prompts: how training changed the answer to each of them, whatever it was that changed.

An item is a prompt under one condition. Its behaviour-change vector is the mean over M1's responses minus the mean over
M0's, both read through the base model: `v_p = mean(p, r1; M0) - mean(p, r0; M0)` (arXiv 2602.11079). Nothing is
filtered, and no verdict is needed. Legend: P items, L layers, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pairtrace.engine.atomic import replacing
from pairtrace.engine.change_vectors import read_differences
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.rollout_table import BASE, TUNED, RolloutTable
from pairtrace.engine.scenarios import RolloutPair, require_same_conversations
from pairtrace.errors import DataError

if TYPE_CHECKING:
    from pairtrace.engine.backend import Backend
    from pairtrace.engine.rendering import Renderer

CHANGED, UNCHANGED = "changed", "unchanged"
# Why an item has no vector, besides the reasons of `read_differences`.
ONE_SIDED = "one_sided"
_METADATA_KEY = "pairtrace"


@dataclass(frozen=True, kw_only=True)
class BagItem:
    """A prompt under one condition.

    Attributes:
        name: unique; the id of the prompt, with the condition behind it in parentheses where the bag has both.
        prompt_id: of the prompt.
        condition: "plain" or "distractor".
        base_rows: rows of the table with M0's responses, ascending.
        tuned_rows: rows with M1's.
    """

    name: str
    prompt_id: str
    condition: str
    base_rows: tuple[int, ...]
    tuned_rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBag:
    """Behaviour-change vectors of a bag.

    Attributes:
        items: P names.
        layers: L layers.
        vectors: float32 [P, L, D]; zero for an unchanged item, NaN for one that could not be read.
        states: per item "changed", "unchanged" (M1 answers as M0 does: the same responses equally often), or why it
            has no vector ("one_sided": only one model answered; otherwise as in `read_differences`).
        pairs: rollout pairs that were read.
    """

    items: tuple[str, ...]
    layers: tuple[int, ...]
    vectors: np.ndarray
    states: tuple[str, ...]
    pairs: int

    @property
    def changed(self) -> np.ndarray:
        """int64, positions of the items that have a direction."""
        return np.flatnonzero(np.array(self.states, dtype=object) == CHANGED)

    @property
    def counts(self) -> dict[str, int]:
        """Number of items by state."""
        return dict(Counter(self.states))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over items, layers, states and vectors."""
        head = json.dumps([self.items, self.layers, self.states]).encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.vectors, "<f4").tobytes()).hexdigest()

    def save(self, path: str | Path, identity: dict[str, Any]) -> None:
        """Write a safetensors file, complete or not at all; `identity` says what it was made from."""
        from safetensors.numpy import save

        manifest = {
            "identity": identity,
            "items": self.items,
            "layers": self.layers,
            "states": self.states,
            "pairs": self.pairs,
            "fingerprint": self.fingerprint,
        }
        with replacing(path) as temporary:
            temporary.write_bytes(save({"vectors": self.vectors}, metadata={_METADATA_KEY: json.dumps(manifest)}))

    @classmethod
    def load(cls, path: str | Path) -> tuple[PromptBag, dict[str, Any]]:
        """Read what `save` wrote, and its identity.

        Raises:
            DataError: the file cannot be read, or its values are not those that were written.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                manifest = json.loads((file.metadata() or {})[_METADATA_KEY])
                vectors = file.get_tensor("vectors")
            bag = cls(
                items=tuple(manifest["items"]),
                layers=tuple(manifest["layers"]),
                vectors=vectors,
                states=tuple(manifest["states"]),
                pairs=manifest["pairs"],
            )
            identity, written = manifest["identity"], manifest.get("fingerprint", bag.fingerprint)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} does not hold a prompt bag ({error!r}); delete it to read the bag again"
            ) from error
        if bag.fingerprint != written:
            raise DataError(f"{path} is damaged: its values have changed; delete it to read the bag again")
        return bag, identity


def bag_items(table: RolloutTable) -> tuple[BagItem, ...]:
    """The items of a rollouts table, in order of appearance."""
    rows: dict[tuple[str, str], dict[str, list[int]]] = {}
    columns = (table.strings(column).tolist() for column in ("prompt_id", "condition", "model"))
    for row, (prompt_id, condition, model) in enumerate(zip(*columns, strict=True)):
        rows.setdefault((prompt_id, condition), {BASE: [], TUNED: []})[model].append(row)
    both = len({condition for _, condition in rows}) > 1
    return tuple(
        BagItem(
            name=f"{prompt_id} ({condition})" if both else prompt_id,
            prompt_id=prompt_id,
            condition=condition,
            base_rows=tuple(found[BASE]),
            tuned_rows=tuple(found[TUNED]),
        )
        for (prompt_id, condition), found in rows.items()
    )


def bag_vectors(
    table: RolloutTable,
    items: Sequence[BagItem],
    renderer: Renderer,
    backend: Backend,
    progress: Progress = NULL_PROGRESS,
) -> PromptBag:
    """Read the rollouts of a bag through the base model.

    What both models said is never read: it takes part in both means and cancels.

    Args:
        table: the rollouts that `items` point into.
        items: P items.
        renderer: of the base model's tokenizer.
        backend: of the base model.
        progress: counts rollout pairs.

    Raises:
        DataFormatError: the two models answered different conversations.
    """
    responses = table.strings("response")
    pairs: list[RolloutPair] = []
    owners: list[tuple[int, float]] = []
    shares = np.zeros(len(items))  # of an item's responses that took part in its vector
    for position, item in enumerate(items):
        tuned, base = ([responses[row] for row in rows] for rows in (item.tuned_rows, item.base_rows))
        coupled = list(couple(tuned, base))
        shares[position] = 1.0 - sum(weight for _, _, weight in coupled) if tuned and base else 0.0
        for first, second, weight in coupled:
            pairs.append(
                RolloutPair(prompt_id=item.name, chosen_row=item.tuned_rows[first], rejected_row=item.base_rows[second])
            )
            owners.append((position, weight))
    require_same_conversations(table, pairs)
    sums = np.zeros((len(items), len(backend.layers), backend.width))
    reasons: list[Counter[str]] = [Counter() for _ in items]
    read = np.zeros(len(items), np.int64)
    for number, difference in read_differences(table, pairs, renderer, backend, progress):
        position, weight = owners[number]
        if isinstance(difference, str) and difference != "identical":
            reasons[position][difference] += 1
            continue
        shares[position] += weight
        if not isinstance(difference, str):
            sums[position] += weight * difference
            read[position] += 1
    states = tuple(
        _state(item, vector, count, found)
        for item, vector, count, found in zip(items, sums, read.tolist(), reasons, strict=True)
    )
    unread = np.array([state not in (CHANGED, UNCHANGED) for state in states], bool)
    sums[unread] = np.nan
    vectors = (sums / np.where(unread, 1.0, shares)[:, None, None]).astype(np.float32)
    return PromptBag(
        items=tuple(item.name for item in items),
        layers=tuple(backend.layers),
        vectors=vectors,
        states=states,
        pairs=int(read.sum()),
    )


def couple(tuned: Sequence[str], base: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """Pair the responses of two models so that weighted differences add up to the difference of the means.

    Equal texts are paired with one another and left out, for their difference is zero; the others in order (the north
    west corner rule of transport problems), so that numbers of responses may differ.

    Yields:
        Position in `tuned`, position in `base`, and weight; the weights add up to the share of responses that differ.
    """
    if not tuned or not base:
        return
    # Units of 1 / (n1 n0), so that masses are whole numbers and cancel exactly.
    left = _masses(tuned, len(base))
    right = _masses(base, len(tuned))
    for text in left.keys() & right.keys():
        common = min(left[text][1], right[text][1])
        left[text][1] -= common
        right[text][1] -= common
    sources, targets = iter(left.values()), iter(right.values())
    first: list[int] | None = [0, 0]
    second: list[int] | None = [0, 0]
    while True:
        while first is not None and first[1] == 0:
            first = next(sources, None)
        while second is not None and second[1] == 0:
            second = next(targets, None)
        if first is None or second is None:
            return
        units = min(first[1], second[1])
        yield first[0], second[0], units / (len(tuned) * len(base))
        first[1] -= units
        second[1] -= units


def _masses(responses: Sequence[str], units: int) -> dict[str, list[int]]:
    """Per text: the position where it stands first, and its mass."""
    masses: dict[str, list[int]] = {}
    for position, text in enumerate(responses):
        masses.setdefault(text, [position, 0])[1] += units
    return masses


def _state(item: BagItem, vector: np.ndarray, read: int, reasons: Counter[str]) -> str:
    if not item.base_rows or not item.tuned_rows:
        return ONE_SIDED
    if read:
        return CHANGED if vector.any() else UNCHANGED
    return reasons.most_common(1)[0][0] if reasons else UNCHANGED
