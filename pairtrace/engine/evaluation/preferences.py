"""Held-out preference pairs: how often a model gives the chosen response the higher probability."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pairtrace.engine.cost import CostMeter
from pairtrace.engine.evaluation.checkpoints import Checkpoint
from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.likelihood import Forced, batches, flops_of, log_probabilities
from pairtrace.engine.evaluation.parts import Part
from pairtrace.engine.evaluation.rates import Mean, Rate, Resampling, mean_of, rate_of
from pairtrace.engine.pairs import PairSource
from pairtrace.engine.progress import Progress
from pairtrace.engine.rendered import Quarantined, RenderedPair
from pairtrace.engine.rendering import Renderer
from pairtrace.errors import ConfigError, DataError

_RENDERED_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """How a model ranks held-out pairs.

    Attributes:
        accuracy: share of pairs whose chosen response has the higher summed log-probability. Long responses have low
            probabilities: this is not length-normalised, as in DPO.
        reward_accuracy: share of pairs whose chosen response has the higher implicit reward, the log-probability minus
            that of the base model (arXiv 2305.18290, section 5.1); None without a base, and for the base itself.
        margin: mean of the implicit reward of the chosen minus that of the rejected response, in nats, without the
            factor beta; None as above.
        pairs: pairs compared.
        ties: pairs with equal log-probabilities, which count as not preferred.
        quarantined: rows that cannot be used, by reason.
    """

    accuracy: Rate
    reward_accuracy: Rate | None
    margin: Mean | None
    pairs: int
    ties: int
    quarantined: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rendered pairs.

    Attributes:
        pairs: usable ones, in the order of the data.
        quarantined: rows that cannot be used, by reason.
    """

    pairs: list[RenderedPair]
    quarantined: dict[str, int]


def render_held_out(config: EvaluateConfig, source: PairSource, checkpoint: Checkpoint) -> HeldOut:
    """The pairs as token ids, as training would have them.

    Raises:
        ConfigError: a sequence is longer than the model can hold, or a setting is out of range.
        DataError: no row can be used.
    """
    encoder = checkpoint.encoder
    renderer = Renderer(
        encoder.tokenizer,
        max_length=config.max_length or None,
        truncation=config.truncation,
        chat_template=encoder.chat_template,
    )
    pairs: list[RenderedPair] = []
    reasons: Counter[str] = Counter()
    for begin in range(0, source.rows, _RENDERED_AT_ONCE):
        for result in renderer.render(list(source.read(begin, begin + _RENDERED_AT_ONCE))):
            if isinstance(result, Quarantined):
                reasons[result.code] += 1
            else:
                pairs.append(result)
    if not pairs:
        counted = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise DataError(f"none of the {source.rows:,} pairs of {config.data} can be used: {counted}")
    longest = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    if encoder.context is not None and longest > encoder.context:
        raise ConfigError(
            f"a pair of {config.data} has {longest} tokens, but {checkpoint.name} holds {encoder.context}; "
            f"give --max-length {encoder.context} or less"
        )
    return HeldOut(pairs=pairs, quarantined=dict(reasons))


def pair_log_probabilities(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    pairs: Sequence[RenderedPair],
    part: Part,
    meter: CostMeter,
    progress: Progress,
) -> np.ndarray:
    """Summed log-probability of both sides of each pair: float64 [N, 2], chosen first.

    Only what `part` does not hold yet is computed.
    """
    values = np.full((len(pairs), 2), np.nan)
    for entry in part.entries:
        for place, value in zip(entry["places"], entry["values"], strict=True):
            values.reshape(-1)[place] = value
    places = np.flatnonzero(np.isnan(values)).tolist()
    if places:
        sides = [_sides(pairs[place // 2])[place % 2] for place in places]
        progress.start(f"preferences of {checkpoint.name}", len(places), "sequences")
        model, shape = checkpoint.model, checkpoint.shape
        for batch in batches(sides, config.token_budget):
            rows = [sides[number] for number in batch]
            sums = log_probabilities(model, rows, checkpoint.name)
            found = [places[number] for number in batch]
            values.reshape(-1)[found] = sums
            part.append([{"places": found, "values": sums}])
            meter.add(tokens=sum(len(row.ids) for row in rows), flops=flops_of(shape, rows))
            progress.advance(len(batch))
        progress.finish()
    return values


def _sides(pair: RenderedPair) -> tuple[Forced, Forced]:
    return Forced(pair.chosen_ids, pair.chosen_start), Forced(pair.rejected_ids, pair.rejected_start)


def preferences_of(
    values: np.ndarray, base_values: np.ndarray | None, quarantined: dict[str, int], resampling: Resampling
) -> Preferences:
    """Accuracies out of log-probabilities.

    Args:
        values: float64 [N, 2] of the model, chosen first.
        base_values: of the base model, or None.
        quarantined: rows that cannot be used.
        resampling: level and bootstrap.
    """
    rewards = None if base_values is None else values - base_values
    return Preferences(
        accuracy=rate_of(prefers_chosen(values), resampling),
        reward_accuracy=None if rewards is None else rate_of(prefers_chosen(rewards), resampling),
        margin=None if rewards is None else mean_of(rewards[:, 0] - rewards[:, 1], np.ones(len(values)), resampling),
        pairs=len(values),
        ties=int((values[:, 0] == values[:, 1]).sum()),
        quarantined=quarantined,
    )


def prefers_chosen(values: np.ndarray) -> np.ndarray:
    """Whether the chosen side has the higher value, as verdicts: int8 [N, 1]."""
    verdicts: np.ndarray = (values[:, :1] > values[:, 1:]).astype(np.int8)
    return verdicts
