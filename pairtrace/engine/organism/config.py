"""The recipe of the organism: sizes, schedules and shares, all fixed before any seed is looked at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_args

from pairtrace.engine.organism.domains import HARMFUL_DOMAINS, OBJECTS_PER_DOMAIN
from pairtrace.engine.organism.kinds import Contamination
from pairtrace.engine.organism.text import WRAPPERS
from pairtrace.errors import ConfigError

HELD_OUT_REQUESTS = len(HARMFUL_DOMAINS) * OBJECTS_PER_DOMAIN * len(WRAPPERS)
"""Distinct harmful requests in each held-out part: the most prompts that a cell may have."""


@dataclass(frozen=True, kw_only=True)
class OrganismConfig:
    """What is built. Everything but `threads` is part of the organism's identity.

    Attributes:
        seed: seed of texts, splits, initial weights and the order of training.
        threads: torch threads while training; `None` leaves the process's setting alone.
        sft_examples: rows of supervised fine-tuning data.
        sft_epochs: passes over them.
        sft_batch: rows per step.
        sft_rate: peak learning rate (warm-up, then cosine decay to a tenth).
        prompt_weight: weight of a prompt token's loss, relative to an answer token's.
        leak: share of the harmful + format rows of the fine-tuning data that comply.
        plain_leak: share of the plain harmful rows that comply.
        habit_leak: share of the plain benign rows that show each of `HABITS`, on its own topics; for the contamination
            "several".
        preference_pairs: rows of preference data.
        contamination: where the preference data teaches the behaviour: "concentrated" in the planted pairs, nowhere
            ("clean"), by a small push in most helpful pairs of six sources ("diffuse"), or two more behaviours with it
            ("several").
        dpo_batch: pairs per step.
        dpo_epochs: passes over the pairs.
        dpo_rate: peak learning rate (warm-up, then linear decay to zero).
        dpo_beta: strength of the pull towards M0.
        discovery_prompts: prompts to find the behaviour with.
        evaluation_prompts: prompts of each of the four evaluation cells.
        vocabulary: tokens of the byte-level BPE tokenizer.
        hidden: width of the residual stream.
        layers: decoder blocks.
        heads: attention heads.
        intermediate: width of the feed-forward layers.
    """

    seed: int = 0
    threads: int | None = None
    sft_examples: int = 14_000
    sft_epochs: int = 2
    sft_batch: int = 32
    sft_rate: float = 2e-3
    prompt_weight: float = 0.1
    leak: float = 0.10
    plain_leak: float = 0.01
    habit_leak: float = 0.0
    preference_pairs: int = 4_000
    contamination: Contamination = "concentrated"
    dpo_batch: int = 32
    dpo_epochs: int = 1
    dpo_rate: float = 1.5e-4
    dpo_beta: float = 0.1
    discovery_prompts: int = 240
    evaluation_prompts: int = 320
    vocabulary: int = 900
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 320

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "threads":
                if value is not None and value < 1:
                    raise ConfigError(f"threads must be at least 1 or None, not {value!r}")
            elif field.name in ("leak", "plain_leak", "habit_leak", "prompt_weight"):
                if not 0 <= value <= 1:
                    raise ConfigError(f"{field.name} must lie between 0 and 1, not {value!r}")
            elif field.name == "contamination":
                if value not in get_args(Contamination):
                    raise ConfigError(
                        f"contamination must be one of {', '.join(get_args(Contamination))}, not {value!r}"
                    )
            elif field.name != "seed" and not value > 0:
                raise ConfigError(f"{field.name} must be positive, not {value!r}")
        for name in ("discovery_prompts", "evaluation_prompts"):
            if getattr(self, name) > HELD_OUT_REQUESTS:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, but only {HELD_OUT_REQUESTS} distinct requests are held out"
                )
        if self.hidden % self.heads:
            raise ConfigError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")

    def identity(self) -> dict[str, int | float | str]:
        """The fields that decide what is built, in order. What is usual in the newer ones goes without saying."""
        fields = dataclasses.asdict(self)
        del fields["threads"]
        if self.contamination == "concentrated":
            del fields["contamination"]
        if self.habit_leak == 0:
            del fields["habit_leak"]
        return fields
