"""Drift: how far a model's next-token distributions have moved from the base model's, on its own responses.

Per response position KL(M || M0) = sum over the vocabulary of p log(p / p0), with the response teacher-forced through
both models. On greedy responses this is the divergence along the path that users see, not an estimate of the divergence
between the two distributions over whole responses; with responses sampled at temperature 1 the sum over a response
estimates the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pairtrace.engine.cost import CostMeter
from pairtrace.engine.evaluation.checkpoints import Checkpoint, PromptTokens
from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.likelihood import Forced, batches, divergences, flops_of
from pairtrace.engine.evaluation.parts import Part
from pairtrace.engine.evaluation.rates import Mean, Resampling, mean_of
from pairtrace.engine.evaluation.requests import Request
from pairtrace.engine.evaluation.responses import Answers
from pairtrace.engine.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Drift:
    """KL divergence of a model from the base model, in nats.

    Attributes:
        per_token: all divergence over all response tokens; the interval is a bootstrap over requests.
        per_response: mean of the sum over a response.
        tokens: response tokens, with the end token of responses that ended.
        responses: responses with at least one token.
        groups: `per_token` by cell and condition.
    """

    per_token: Mean
    per_response: Mean
    tokens: int
    responses: int
    groups: dict[str, Mean]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def forced_answers(checkpoint: Checkpoint, tokens: PromptTokens, answers: Answers) -> list[list[Forced]]:
    """Every response behind its prompt as token ids: tokenised again, and the end token where the response ended."""
    tokenizer = checkpoint.encoder.tokenizer
    texts = [answer.text or "" for samples in answers for answer in samples]
    encoded = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    rows = []
    for prompt, samples in zip(tokens.of(checkpoint.encoder), answers, strict=True):
        forced = []
        for answer in samples:
            response = list(next(encoded))
            if answer.finished and end is not None:
                response.append(end)
            forced.append(Forced([*prompt, *response], len(prompt)))
        rows.append(forced)
    return rows


def response_divergences(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    base: Checkpoint,
    rows: Sequence[Forced],
    part: Part,
    meter: CostMeter,
    progress: Progress,
) -> list[float]:
    """Summed divergence of each response, in nats; only what `part` does not hold yet is computed."""
    known = {
        place: value for entry in part.entries for place, value in zip(entry["places"], entry["values"], strict=True)
    }
    known |= {place: 0.0 for place, row in enumerate(rows) if row.response_tokens == 0}
    places = [place for place in range(len(rows)) if place not in known]
    if places:
        progress.start(f"drift of {checkpoint.name}", len(places), "responses")
        model, other, shape = checkpoint.sampler.model, base.sampler.model, checkpoint.shape
        for batch in batches([rows[place] for place in places], config.token_budget):
            found = [places[number] for number in batch]
            chosen = [rows[place] for place in found]
            values = divergences(model, other, chosen, checkpoint.name)
            known |= dict(zip(found, values, strict=True))
            part.append([{"places": found, "values": values}])
            meter.add(tokens=2 * sum(len(row.ids) for row in chosen), flops=2 * flops_of(shape, chosen))
            progress.advance(len(batch))
        progress.finish()
    return [known[place] for place in range(len(rows))]


def drift_of(
    requests: Sequence[Request], rows: Sequence[Sequence[Forced]], values: Sequence[float], resampling: Resampling
) -> Drift:
    """Means out of the summed divergences.

    Args:
        requests: what was asked.
        rows: for each request its responses.
        values: divergence of each response, in the order of `rows`.
        resampling: level and bootstrap.
    """
    lengths = [np.array([row.response_tokens for row in samples]) for samples in rows]
    ends = np.cumsum([len(samples) for samples in rows])
    divergence = np.array([part.sum() for part in np.split(np.asarray(values, dtype=float), ends[:-1])])
    tokens = np.array([part.sum() for part in lengths], dtype=float)
    counted = np.array([(part > 0).sum() for part in lengths], dtype=float)
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(" / ".join(request.group), []).append(number)
    return Drift(
        per_token=mean_of(divergence, tokens, resampling),
        per_response=mean_of(divergence, counted, resampling),
        tokens=int(tokens.sum()),
        responses=int(counted.sum()),
        groups={name: mean_of(divergence[members], tokens[members], resampling) for name, members in groups.items()},
    )
