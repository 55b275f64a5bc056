"""The responses of the models: sampled, or read from a file."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pairtrace.engine.cost import CostMeter
from pairtrace.engine.evaluation.checkpoints import Checkpoint, PromptTokens
from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.parts import Part
from pairtrace.engine.evaluation.requests import Request
from pairtrace.engine.flops import causal
from pairtrace.engine.json_rows import line_objects
from pairtrace.engine.progress import Progress
from pairtrace.engine.prompts import PLAIN
from pairtrace.errors import DataFormatError, DataMismatchError

# What is kept of a response; entries of earlier versions, without the tokens, are not read.
_ENTRIES = "text, token_ids, finished"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response.

    Attributes:
        text: None when there is none (a null in the file).
        tokens: generated tokens with the end token; None when unknown.
        finished: an end token was reached; None when unknown.
        label: verdict of the label column; None when undecided.
        token_ids: the generated tokens, the end token included; None when unknown.
    """

    text: str | None
    tokens: int | None = None
    finished: bool | None = None
    label: bool | None = None
    token_ids: tuple[int, ...] | None = None


Answers = list[list[Answer]]
"""Of one model: for each request its samples, at least one."""


def responses_identity(config: EvaluateConfig, checkpoint: Checkpoint, prompts_fingerprint: str) -> dict[str, Any]:
    """What decides the responses of a model; the conditions do not, since each response is found by its own."""
    names = ("temperature", "max_new_tokens", "seed")
    return {
        **checkpoint.identity,
        "entries": _ENTRIES,
        "prompts_fingerprint": prompts_fingerprint,
        **{name: getattr(config, name) for name in names},
        # Parts from before there was a choice say nothing of it.
        **({} if config.backend == "hf" else {"backend": config.backend}),
    }


def sample_answers(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    tokens: PromptTokens,
    part: Part,
    meter: CostMeter,
    progress: Progress,
    *,
    title: str | None = None,
) -> Answers:
    """What a checkpoint answers; only what `part` does not hold yet is sampled.

    A response's seed does not depend on the model: models that are compared draw the same random numbers. `title` is
    what the progress calls the work.

    Raises:
        DataError, ConfigError, ModelError: a prompt or the checkpoint cannot be used.
    """
    from pairtrace.engine.sampling import Request as SamplingRequest
    from pairtrace.engine.sampling import Sampled, rollout_seed

    known = {tuple(entry["key"]): entry for entry in part.entries}
    keys = [(*request.key, sample) for request in requests for sample in range(config.samples)]
    prompts = [ids for ids in tokens.of(checkpoint.encoder) for _ in range(config.samples)]
    names = [request.name for request in requests for _ in range(config.samples)]
    open_positions = [position for position, key in enumerate(keys) if key not in known]
    if open_positions:
        progress.start(title or f"responses of {checkpoint.name}", len(open_positions), "responses")
        sampler, shape, generated = checkpoint.sampler, checkpoint.shape, 0

        def on_batch(finished: list[tuple[int, Sampled]]) -> None:
            nonlocal generated
            entries = []
            for number, answer in finished:
                position = open_positions[number]
                known[keys[position]] = {
                    "text": answer.response,
                    "token_ids": list(answer.token_ids),
                    "finished": answer.finished,
                }
                entries.append({"key": list(keys[position]), **known[keys[position]]})
                total = len(prompts[position]) + answer.tokens - 1
                flops = 0.0
                if shape is not None:
                    flops = shape.forward_flops(total, causal(total), shape.blocks)
                    flops += shape.head_flops_per_token * answer.tokens
                meter.add(tokens=total, flops=flops)
                generated += answer.tokens
            part.append(entries)
            progress.advance(len(finished), tokens=generated)

        sampler.sample(
            [
                SamplingRequest(
                    name=names[position],
                    prompt=prompts[position],
                    seed=rollout_seed(config.seed, *keys[position]),
                    adapter=checkpoint.adapter_path,
                )
                for position in open_positions
            ],
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            on_batch=on_batch,
        )
        progress.finish()
    answers = [
        Answer(
            text=known[key]["text"],
            tokens=len(known[key]["token_ids"]),
            finished=known[key]["finished"],
            token_ids=tuple(known[key]["token_ids"]),
        )
        for key in keys
    ]
    return [answers[begin : begin + config.samples] for begin in range(0, len(answers), config.samples)]


def read_answers(config: EvaluateConfig, requests: Sequence[Request]) -> dict[str, Answers]:
    """The responses of a file, by model, in the order of `config.models` or of appearance.

    Raises:
        DataFormatError: the file cannot be read, a column is missing or a value unusable.
        DataMismatchError: prompts or models that are not known, responses given twice, requests without a response.
    """
    path = Path(config.rollouts or "")
    rows = read_rows(path)
    conditions: dict[str, list[str]] = {request.prompt.id: [] for request in requests}
    for request in requests:
        conditions[request.prompt.id].append(request.condition)
    found: dict[str, dict[tuple[str, str], dict[int, Answer]]] = {}
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        model, identifier = _text(row, "model", where), _text(row, "prompt_id", where)
        if identifier not in conditions:
            raise DataMismatchError(f"{where}: the prompt {identifier!r} is not among those of {config.prompts}")
        only = conditions[identifier][0] if len(conditions[identifier]) == 1 else PLAIN
        condition = only if row.get("condition") is None else _text(row, "condition", where)
        if condition not in conditions[identifier]:
            continue
        samples = found.setdefault(model, {}).setdefault((condition, identifier), {})
        sample = row.get("sample")
        sample = len(samples) if sample is None else sample
        if not isinstance(sample, int) or sample in samples:
            raise DataMismatchError(
                f"{where}: the response to {identifier!r} ({condition}), sample {sample!r}, is unusable or given twice"
            )
        samples[sample] = _answer(row, config.label_column, where)
    models = config.models or tuple(found)
    unknown = [model for model in models if model not in found]
    if unknown or not models:
        raise DataMismatchError(
            f"{path} has no responses of {', '.join(unknown) or 'any model'}; it has those of "
            f"{', '.join(found) or 'none'}"
        )
    return {model: _in_order(found[model], requests, model, path) for model in models}


def _in_order(
    found: dict[tuple[str, str], dict[int, Answer]], requests: Sequence[Request], model: str, path: Path
) -> Answers:
    missing = [request for request in requests if request.key not in found]
    if missing:
        raise DataMismatchError(
            f"{path} has no response of {model} to {len(missing)} of {len(requests)} requests, for example "
            f"{missing[0].name}; models are compared on the same requests (a response that failed may be null)"
        )
    return [[answer for _, answer in sorted(found[request.key].items())] for request in requests]


def _answer(row: dict[str, Any], label_column: str | None, where: str) -> Answer:
    text, finished = row.get("response"), row.get("finished")
    if "response" not in row or not isinstance(text, str | None) or not isinstance(finished, bool | None):
        raise DataFormatError(f"{where}: expected text or null in 'response' and true, false or null in 'finished'")
    label = None
    if label_column is not None:
        if label_column not in row:
            raise DataFormatError(f"{where}: no column {label_column!r}; columns found: {', '.join(row)}")
        label = row[label_column]
        if isinstance(label, float) and math.isnan(label):
            label = None
        if label is not None and not (isinstance(label, bool | int | float) and label in (0, 1)):
            raise DataFormatError(
                f"{where}: {label_column} is {label!r}; expected true or 1 (shows the behaviour), false or 0, or "
                "nothing"
            )
    return Answer(text=text, finished=finished, label=None if label is None else bool(label))


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value:
        raise DataFormatError(f"{where}: {column} is {value!r}; expected text; columns found: {', '.join(row)}")
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of responses (.parquet, .jsonl, .jsonl.gz), nothing checked.

    Raises:
        DataFormatError: the file cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                rows = [row for _, row in line_objects(file, str(path), 0)]
    except FileNotFoundError as error:
        raise DataFormatError(f"cannot read the responses {path}: there is no such file") from error
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        raise DataFormatError(f"cannot read the responses {path}: {error}") from error
    return rows
