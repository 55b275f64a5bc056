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
from pairtrace.engine.evaluation.responses import Answer, Answers
from pairtrace.engine.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Drift:
    """KL divergence of a model from the base model, in nats.

    Attributes:
        per_token: all divergence over all response tokens; the interval is a bootstrap over requests.
        per_response: mean of the sum over a response.
        tokens: response tokens, with the end token of responses that ended.
        responses: responses with at least one token.
        retokenized: responses of a file, whose text was tokenised again: their tokens may differ from those generated.
        groups: `per_token` by cell and condition.
    """

    per_token: Mean
    per_response: Mean
    tokens: int
    responses: int
    retokenized: int
    groups: dict[str, Mean]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def forced_answers(checkpoint: Checkpoint, tokens: PromptTokens, answers: Answers) -> list[list[Forced]]:
    """Every response behind its prompt, as the token ids that were generated.

    Where these are unknown (responses of a file) the text is tokenised again, with the end token where it ended.
    """
    return [
        [Forced([*prompt, *_response_ids(checkpoint, answer)], len(prompt)) for answer in samples]
        for prompt, samples in zip(tokens.of(checkpoint.encoder), answers, strict=True)
    ]


def _response_ids(checkpoint: Checkpoint, answer: Answer) -> Sequence[int]:
    if answer.token_ids is not None:
        return answer.token_ids
    tokenizer = checkpoint.encoder.tokenizer
    ids = tokenizer(answer.text or "", add_special_tokens=False, return_attention_mask=False, verbose=False)
    end = tokenizer.eos_token_id
    return [*ids["input_ids"], *([end] if answer.finished and end is not None else [])]


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
        model, other, shape = checkpoint.model, base.model, checkpoint.shape
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
    requests: Sequence[Request],
    answers: Answers,
    rows: Sequence[Sequence[Forced]],
    values: Sequence[float],
    resampling: Resampling,
) -> Drift:
    """Means out of the summed divergences.

    Args:
        requests: what was asked.
        answers: what was said.
        rows: for each request its responses, as tokens.
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
        retokenized=sum(answer.token_ids is None for samples in answers for answer in samples),
        groups={name: mean_of(divergence[members], tokens[members], resampling) for name, members in groups.items()},
    )
