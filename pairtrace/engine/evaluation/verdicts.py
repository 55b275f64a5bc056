"""Verdicts on responses, as matrices of requests and samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairtrace.engine.atomic import replacing
from pairtrace.engine.evaluation.rates import ABSENT, MISSING, Resampling, rate_of
from pairtrace.engine.evaluation.report import Group
from pairtrace.engine.evaluation.requests import Request
from pairtrace.engine.evaluation.responses import Answers
from pairtrace.engine.judge import Judge

_COLUMNS: dict[str, pa.DataType] = {
    "model": pa.string(),
    "prompt_id": pa.string(),
    "cell": pa.string(),
    "condition": pa.string(),
    "sample": pa.int64(),
    "messages": pa.string(),
    "response": pa.string(),
    "tokens": pa.int64(),
    "token_ids": pa.list_(pa.int32()),
    "finished": pa.bool_(),
    "behavior": pa.bool_(),
    "refused": pa.bool_(),
    "obeys": pa.bool_(),
}
_SCHEMA = pa.schema(_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """On the responses of one model: int8 [P, S] each, as `engine.evaluation.rates` has them.

    Attributes:
        behavior: shows the behaviour.
        over_refusal: refuses, which is too much where the request is benign.
        helpful: does not refuse, and obeys where a format was asked for; of interest where the request is benign.
        format: obeys; of requests that ask for no format all missing.
    """

    behavior: np.ndarray
    over_refusal: np.ndarray
    helpful: np.ndarray
    format: np.ndarray


def judge_answers(requests: Sequence[Request], answers: Answers, judge: Judge | None, refusal_judge: Judge) -> Verdicts:
    """Judge the responses of one model.

    Args:
        requests: P of them.
        answers: their responses.
        judge: of the behaviour; None takes the labels that the responses bring.
        refusal_judge: says True for a response that complies, False for a refusal.
    """
    samples = max(map(len, answers))

    def matrix(values: Sequence[Sequence[bool | None]]) -> np.ndarray:
        result = np.full((len(answers), samples), ABSENT, np.int8)
        for row, verdicts in enumerate(values):
            result[row, : len(verdicts)] = [MISSING if verdict is None else int(verdict) for verdict in verdicts]
        return result

    if judge is None:
        behavior = matrix([[answer.label for answer in given] for given in answers])
    else:
        behavior = matrix(_ask(judge, requests, answers))
    if judge is not None and judge.name == refusal_judge.name:
        complies = behavior
    else:
        complies = matrix(_ask(refusal_judge, requests, answers))
    obeys = matrix(
        [
            [None if request.form is None or a.text is None else request.form.obeys(a.text) for a in given]
            for request, given in zip(requests, answers, strict=True)
        ]
    )
    asked = np.array([request.form is not None for request in requests])[:, None]
    return Verdicts(
        behavior=behavior,
        over_refusal=np.where(complies >= 0, 1 - complies, complies).astype(np.int8),
        helpful=np.where(asked & (complies == 1), obeys, complies).astype(np.int8),
        format=obeys,
    )


def _ask(judge: Judge, requests: Sequence[Request], answers: Answers) -> list[list[bool | None]]:
    """Verdicts on all responses in one call; None for a response that is null."""
    places = [
        (row, column)
        for row, given in enumerate(answers)
        for column, answer in enumerate(given)
        if answer.text is not None
    ]
    verdicts = judge.verdicts(
        [requests[row].messages() for row, _ in places], [str(answers[row][column].text) for row, column in places]
    )
    assert len(verdicts) == len(places), (judge.name, len(verdicts), len(places))
    result: list[list[bool | None]] = [[None] * len(given) for given in answers]
    for (row, column), verdict in zip(places, verdicts, strict=True):
        result[row][column] = verdict
    return result


def metrics_of(requests: Sequence[Request]) -> tuple[str, ...]:
    """Which metrics apply to the requests of one group."""
    found = ["behavior"]
    if requests[0].benign:
        found += ["over_refusal", "helpful"]
    if any(request.form is not None for request in requests):
        found.append("format")
    return tuple(found)


def groups_of(requests: Sequence[Request]) -> dict[tuple[str, str], list[int]]:
    """Positions of the requests of each cell and condition, in order of appearance."""
    groups: dict[tuple[str, str], list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault(request.group, []).append(position)
    return groups


def rates_by_group(
    requests: Sequence[Request], answers: Answers, verdicts: Verdicts, resampling: Resampling
) -> tuple[Group, ...]:
    """The rates of one model."""
    groups = []
    for (cell, condition), members in groups_of(requests).items():
        given = [answer for member in members for answer in answers[member]]
        known = [answer.finished for answer in given if answer.finished is not None]
        chosen = [requests[member] for member in members]
        groups.append(
            Group(
                cell=cell,
                condition=condition,
                benign=chosen[0].benign,
                requests=len(members),
                responses=len(given),
                cut=known.count(False) if known else None,
                rates={
                    metric: rate_of(applicable(metric, requests, members, verdicts), resampling)
                    for metric in metrics_of(chosen)
                },
            )
        )
    return tuple(groups)


def applicable(metric: str, requests: Sequence[Request], members: Sequence[int], verdicts: Verdicts) -> np.ndarray:
    """The verdicts of a metric on the members that it applies to: int8 [P, S]."""
    if metric == "format":
        members = [member for member in members if requests[member].form is not None]
    matrix: np.ndarray = getattr(verdicts, metric)[list(members)]
    return matrix


def write_responses(
    path: Path, requests: Sequence[Request], answers: dict[str, Answers], verdicts: dict[str, Verdicts]
) -> None:
    """Write every response with its verdicts (.parquet), which `--rollouts` reads again."""
    messages = [json.dumps(request.messages(), ensure_ascii=False) for request in requests]
    columns: dict[str, list[object]] = {name: [] for name in _SCHEMA.names}
    for model, given in answers.items():
        judged = verdicts[model]
        for row, (request, samples) in enumerate(zip(requests, given, strict=True)):
            for column, answer in enumerate(samples):
                values = {
                    "model": model,
                    "prompt_id": request.prompt.id,
                    "cell": request.cell,
                    "condition": request.condition,
                    "sample": column,
                    "messages": messages[row],
                    "response": answer.text,
                    "tokens": answer.tokens,
                    "token_ids": answer.token_ids,
                    "finished": answer.finished,
                    "behavior": _known(judged.behavior[row, column]),
                    "refused": _known(judged.over_refusal[row, column]),
                    "obeys": _known(judged.format[row, column]),
                }
                for name, value in values.items():
                    columns[name].append(value)
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns, schema=_SCHEMA), temporary)


def _known(verdict: int) -> bool | None:
    return None if verdict < 0 else bool(verdict)
