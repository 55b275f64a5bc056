"""Preference pairs out of sampled responses: the one least like the behaviour is chosen, the one most like it rejected.

Legend: P prompts, S samples of each.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.atomic import replacing
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.evaluation.checkpoints import Checkpoint, PromptTokens
from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.parts import open_part
from pairtrace.engine.evaluation.requests import Request, requests_of
from pairtrace.engine.evaluation.responses import Answers, responses_identity, sample_answers
from pairtrace.engine.finetuning.config import FinetuneConfig
from pairtrace.engine.finetuning.signals import ResponseSignal
from pairtrace.engine.progress import Progress
from pairtrace.engine.prompts import load_prompts
from pairtrace.engine.tables import file_digest
from pairtrace.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PairChoice:
    """What became of the sampled responses.

    Attributes:
        prompts: P.
        responses: sampled.
        cut: responses that reached the limit of tokens before they ended.
        pairs: written, at most one for a prompt.
        left_out: prompts without a pair, by reason: "no_spread" (all responses alike for the signal),
            "too_few_responses" (fewer than two that are not empty and have a rating).
        chosen, rejected: mean probability of the chosen and of the rejected responses; None without a signal.
    """

    prompts: int
    responses: int
    cut: int
    pairs: int
    left_out: dict[str, int]
    chosen: float | None
    rejected: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def choose_pair(probabilities: np.ndarray, usable: Sequence[bool], min_gap: float) -> tuple[int, int] | str:
    """Which responses to one prompt make the pair.

    Args:
        probabilities: float64 [S], NaN where there is none.
        usable: S of them, whether a response can be trained on.
        min_gap: probabilities that differ by no more make no pair.

    Returns:
        Positions of the lowest (chosen) and of the highest (rejected), the first of equals; or why there is no pair.
    """
    places = [place for place, good in enumerate(usable) if good and not np.isnan(probabilities[place])]
    if len(places) < 2:
        return "too_few_responses"
    lowest, highest = (pick(places, key=lambda place: probabilities[place]) for pick in (min, max))
    if not probabilities[highest] - probabilities[lowest] > min_gap:
        return "no_spread"
    return lowest, highest


def draw_pair(usable: Sequence[bool], texts: Sequence[str | None], rng: np.random.Generator) -> tuple[int, int] | str:
    """Two different responses drawn at random: what the choice of a signal is compared with."""
    places = [place for place, good in enumerate(usable) if good]
    if len(places) < 2:
        return "too_few_responses"
    order = rng.permutation(places).tolist()
    others = [place for place in order[1:] if texts[place] != texts[order[0]]]
    return (order[0], others[0]) if others else "no_spread"


def write_pairs(
    config: FinetuneConfig, path: Path, signal: ResponseSignal | None, identity: dict[str, Any], progress: Progress
) -> PairChoice:
    """Sample responses of the model and write preference pairs as TRL reads them (jsonl, conversational).

    Finished batches of responses are kept in `{path stem}.samples`, for a run that goes on and for another signal.
    Pairs that are there already and were made alike are taken.

    Args:
        config: what to sample, and how to choose.
        path: of the pairs; beside it `{path}.json` says how they were made.
        signal: what responses are told apart by; None draws pairs at random.
        identity: what decides the pairs, plain JSON values.
        progress: receives the stages.

    Raises:
        DataError: prompts cannot be used, or no prompt gives a pair.
        ModelError, ConfigError: the model cannot be used.
    """
    description = Path(f"{path}.json")
    made = _made_alike(path, description, identity)
    if made is not None:
        logger.info("%s holds these pairs already", path)
        return made
    prompts = load_prompts(config.data, mixed=True)
    requests = requests_of(prompts, config.conditions)
    settings = EvaluateConfig(
        prompts=config.data,
        models=(config.model,),
        temperature=config.temperature,
        samples=config.samples,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.sample_batch,
        seed=config.seed,
        device=config.device,
        chat_template=config.chat_template,
        template_date=config.template_date,
    )
    checkpoint = Checkpoint(config.model, settings)
    tokens = PromptTokens(requests, config.max_new_tokens)
    folder = path.with_name(path.stem + ".samples")
    costs: dict[str, Any] = {"method": "finetune", "device": config.device, "path": costs_path(path), "resumed": True}
    with (
        open_part(folder, "responses", responses_identity(settings, checkpoint, prompts.fingerprint)) as part,
        CostMeter(stage="sample", **costs) as meter,
    ):
        answers = sample_answers(settings, checkpoint, requests, tokens, part, meter, progress)
    checkpoint.release()
    with CostMeter(stage="select", **costs) as meter:
        ratings = None if signal is None else _ratings(signal, requests, answers, meter, progress)
    choice, rows = _chosen(config, requests, answers, ratings)
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in choice.left_out.items())
        raise DataError(
            f"none of the {choice.prompts} prompts gives a pair ({reasons}): no two responses to a prompt differ for "
            f"the signal {config.signal}; give more --samples, a higher --temperature, or a smaller --min-gap"
        )
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with replacing(description) as temporary:
        content = {"identity": identity, "choice": choice.to_dict(), "digest": file_digest([path])}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return choice


def _made_alike(path: Path, description: Path, identity: dict[str, Any]) -> PairChoice | None:
    """The choice that made the pairs at `path`, where it was this one; what cannot be read is made again."""
    if not path.exists():
        return None
    try:
        found = json.loads(description.read_text(encoding="utf-8"))
        # A run that was killed between the two files, or a user, may have left other pairs beside this description.
        alike = found["identity"] == identity and found["digest"] == file_digest([path])
        return PairChoice(**found["choice"]) if alike else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ratings(
    signal: ResponseSignal, requests: Sequence[Request], answers: Answers, meter: CostMeter, progress: Progress
) -> np.ndarray:
    """float64 [P, S]; an empty response has none."""
    ratings = np.full((len(answers), max(map(len, answers))), np.nan)
    places = [
        (row, column)
        for row, given in enumerate(answers)
        for column, answer in enumerate(given)
        if answer.text is not None and answer.text.strip()
    ]
    conversations = [requests[row].messages() for row, _ in places]
    texts = [str(answers[row][column].text) for row, column in places]
    if places:
        ratings[tuple(np.array(places).T)] = signal.probabilities(conversations, texts, meter, progress)
    return ratings


def _chosen(
    config: FinetuneConfig, requests: Sequence[Request], answers: Answers, ratings: np.ndarray | None
) -> tuple[PairChoice, list[dict[str, Any]]]:
    rng = np.random.default_rng(config.seed)
    rows: list[dict[str, Any]] = []
    left_out = Counter[str]()
    values = []
    for number, (request, given) in enumerate(zip(requests, answers, strict=True)):
        texts = [answer.text for answer in given]
        usable = [text is not None and bool(text.strip()) for text in texts]
        if ratings is None:
            found = draw_pair(usable, texts, rng)
        else:
            found = choose_pair(ratings[number], usable, config.min_gap)
        if isinstance(found, str):
            left_out[found] += 1
            continue
        row: dict[str, Any] = {"prompt": request.messages()}
        for side, place in zip(("chosen", "rejected"), found, strict=True):
            row[side] = [{"role": "assistant", "content": texts[place]}]
        row |= {"source": request.cell, "prompt_id": request.prompt.id, "condition": request.condition}
        if ratings is not None:
            values.append(ratings[number, list(found)])
            row |= dict(zip(("probability_chosen", "probability_rejected"), values[-1].tolist(), strict=True))
        rows.append(row)
    means = np.mean(values, axis=0).tolist() if values else [None, None]
    choice = PairChoice(
        prompts=len(requests),
        responses=sum(map(len, answers)),
        cut=sum(answer.finished is False for given in answers for answer in given),
        pairs=len(rows),
        left_out=dict(left_out),
        chosen=means[0],
        rejected=means[1],
    )
    return choice, rows
