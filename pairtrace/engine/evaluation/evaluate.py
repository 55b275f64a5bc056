"""The evaluation: models answer, verdicts become rates, rates are compared; drift, preferences and capabilities."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from pairtrace.engine.atomic import replacing
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.evaluation.capabilities import capability_scores, load_lm_eval
from pairtrace.engine.evaluation.checkpoints import Checkpoint, PromptTokens, require_same_tokenizer
from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.drift import Drift, drift_of, forced_answers, response_divergences
from pairtrace.engine.evaluation.earlier import require_addition
from pairtrace.engine.evaluation.parts import Part, open_part
from pairtrace.engine.evaluation.preferences import (
    HeldOut,
    pair_log_probabilities,
    preferences_of,
    prefers_chosen,
    render_held_out,
)
from pairtrace.engine.evaluation.rates import difference_of
from pairtrace.engine.evaluation.report import Comparison, Evaluation, ModelReport
from pairtrace.engine.evaluation.requests import requests_of
from pairtrace.engine.evaluation.responses import Answers, read_answers, responses_identity, sample_answers
from pairtrace.engine.evaluation.verdicts import (
    Verdicts,
    applicable,
    groups_of,
    judge_answers,
    metrics_of,
    rates_by_group,
    write_responses,
)
from pairtrace.engine.judge import Judge, load_rules
from pairtrace.engine.pairs import PairSource, open_pairs
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.prompts import PromptSet, load_prompts
from pairtrace.engine.versions import library_versions

METHOD = "evaluation"


def evaluate(config: EvaluateConfig, progress: Progress = NULL_PROGRESS, *, judge: Judge | None = None) -> Evaluation:
    """Measure and compare models.

    With `config.out` every finished batch is kept, so that an interrupted run goes on where it stopped, and a model
    that is added later does not make the others answer again.

    Args:
        config: what to do.
        progress: receives a stage per model and measurement.
        judge: of the behaviour, instead of `config.rules`.

    Raises:
        DataError: prompts, responses or pairs cannot be used.
        ModelError: a checkpoint is missing, damaged or half written, or its tokenizer is not that of the base.
        ConfigError: an option cannot be used, or `out` holds a report that was made with other settings.
        MissingDependencyError: `lm_eval` without the package.
    """
    begun = time.perf_counter()
    run = _Run(config, progress)
    refusal_judge = load_rules(config.refusal_rules)
    if config.label_column is None:
        judge = judge or load_rules(config.rules)
    answers = {} if config.rollouts is None else read_answers(config, run.requests)
    verdicts: dict[str, Verdicts] = {}
    reports, values = [], {}
    for name in config.models or tuple(answers):
        checkpoint = run.checkpoints.get(name)
        if name not in answers:
            assert checkpoint is not None
            answers[name] = run.answers(checkpoint)
        verdicts[name] = judge_answers(run.requests, answers[name], judge, refusal_judge)
        if checkpoint is not None and run.source is not None:
            values[name] = run.log_probabilities(checkpoint)
        reports.append(
            ModelReport(
                model=name,
                fingerprint=None if checkpoint is None else checkpoint.fingerprint,
                groups=rates_by_group(run.requests, answers[name], verdicts[name], config.resampling),
                preferences=run.preferences(checkpoint, values) if name in values and checkpoint else None,
                drift=None if checkpoint is None else run.drift(checkpoint, answers[name]),
                capabilities=None if checkpoint is None else run.capabilities(checkpoint),
            )
        )
        run.release(checkpoint)
    result = Evaluation(
        models=tuple(reports),
        comparisons=tuple(_comparisons(run, verdicts, values)),
        judge=f"column:{config.label_column}" if judge is None else judge.name,
        refusal_judge=refusal_judge.name if any(request.benign for request in run.requests) else None,
        missing_verdicts=sum(rate.rates["behavior"].missing for model in reports for rate in model.groups),
        base=config.base,
        confidence=config.confidence,
        out=config.out,
        settings=run.settings,
        versions=library_versions(),
        seconds=time.perf_counter() - begun,
    )
    if config.out is not None:
        responses = config.beside(".responses.parquet")
        assert responses is not None
        write_responses(responses, run.requests, answers, verdicts)
        with replacing(config.out) as temporary:
            temporary.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    return result


class _Run:
    """What the stages of one evaluation share; everything that could stop it later is checked here."""

    def __init__(self, config: EvaluateConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.prompts: PromptSet = load_prompts(config.prompts, mixed=True)
        self.requests = requests_of(self.prompts, config.conditions)
        self.settings = {**asdict(config), "prompts_fingerprint": self.prompts.fingerprint}
        require_addition(config.out, self.settings)
        if config.lm_eval:
            load_lm_eval()
        named = config.models if config.needs_checkpoints else ()
        self.checkpoints = {name: Checkpoint(name, config) for name in named}
        self.base = None
        if config.base is not None:
            self.base = self.checkpoints.get(config.base) or Checkpoint(config.base, config)
            for checkpoint in self.checkpoints.values():
                require_same_tokenizer(checkpoint, self.base)
        self.source: PairSource | None = None
        if config.data is not None:
            self.source = open_pairs(config.data, format=config.format, split=config.split)
        self._tokens = PromptTokens(self.requests, config.max_new_tokens)
        for checkpoint in self.checkpoints.values():
            self._tokens.of(checkpoint.encoder)
        self._held_out: dict[str, HeldOut] = {}
        self._base_values: np.ndarray | None = None
        self._folder = config.beside(".parts")
        self._resumed = self._folder is not None and self._folder.is_dir()
        self._metered: set[str] = set()

    @contextmanager
    def _stage(self, stage: str, checkpoint: Checkpoint, identity: dict[str, Any]) -> Iterator[tuple[Part, CostMeter]]:
        """The entries of a stage, and the meter of what is added to them."""
        path = None if self.config.out is None else costs_path(self.config.out)
        meter = CostMeter(
            method=METHOD,
            stage=stage,
            device=self.config.device,
            path=path,
            resumed=self._resumed or stage in self._metered,
        )
        meter.extra["model"] = checkpoint.name
        self._metered.add(stage)
        with open_part(self._folder, stage, identity) as part, meter:
            yield part, meter

    def answers(self, checkpoint: Checkpoint) -> Answers:
        """What a checkpoint says to the requests."""
        identity = responses_identity(self.config, checkpoint, self.prompts.fingerprint)
        with self._stage("responses", checkpoint, identity) as (part, meter):
            return sample_answers(self.config, checkpoint, self.requests, self._tokens, part, meter, self.progress)

    def log_probabilities(self, checkpoint: Checkpoint) -> np.ndarray:
        """Of the held-out pairs: float64 [N, 2]."""
        if checkpoint is self.base and self._base_values is not None:
            return self._base_values
        assert self.source is not None
        config = self.config
        identity = {
            **checkpoint.identity,
            "data_fingerprint": self.source.fingerprint,
            "max_length": config.max_length,
            "truncation": config.truncation,
        }
        pairs = self._pairs(checkpoint).pairs
        with self._stage("preferences", checkpoint, identity) as (part, meter):
            values = pair_log_probabilities(config, checkpoint, pairs, part, meter, self.progress)
        if checkpoint is self.base:
            self._base_values = values
        return values

    def same_pairs(self, one: str, other: str) -> bool:
        """Whether two checkpoints can use the same rows of the held-out pairs."""
        rows = [[pair.row for pair in self._pairs(self.checkpoints[name]).pairs] for name in (one, other)]
        return rows[0] == rows[1]

    def _pairs(self, checkpoint: Checkpoint) -> HeldOut:
        assert self.source is not None
        key = str(checkpoint.encoder.identity)
        if key not in self._held_out:
            self._held_out[key] = render_held_out(self.config, self.source, checkpoint)
        return self._held_out[key]

    def preferences(self, checkpoint: Checkpoint, values: dict[str, np.ndarray]) -> Any:
        """Accuracies of a checkpoint, against the base where there is one."""
        base_values = None
        if self.base is not None and checkpoint.fingerprint != self.base.fingerprint:
            base_values = self.log_probabilities(self.base)
        quarantined = self._pairs(checkpoint).quarantined
        return preferences_of(values[checkpoint.name], base_values, quarantined, self.config.resampling)

    def drift(self, checkpoint: Checkpoint, answers: Answers) -> Drift | None:
        """KL from the base on the checkpoint's own responses; None without a base, and for the base itself."""
        if self.base is None or not self.config.drift or checkpoint.fingerprint == self.base.fingerprint:
            return None
        rows = forced_answers(checkpoint, self._tokens, answers)
        flat = [row for samples in rows for row in samples]
        identity = {
            **checkpoint.identity,
            "base_fingerprint": self.base.fingerprint,
            "responses": [[list(map(int, row.ids)), row.start] for row in flat],
        }
        with self._stage("drift", checkpoint, _digest_of(identity, "responses")) as (part, meter):
            values = response_divergences(self.config, checkpoint, self.base, flat, part, meter, self.progress)
        return drift_of(self.requests, answers, rows, values, self.config.resampling)

    def capabilities(self, checkpoint: Checkpoint) -> Any:
        """Scores of lm-eval, or None when no task is asked for; it loads the weights itself."""
        if not self.config.lm_eval:
            return None
        self.release(checkpoint)
        identity = {**checkpoint.identity, "limit": self.config.lm_eval_limit}
        with self._stage("capabilities", checkpoint, identity) as (part, _):
            return capability_scores(self.config, checkpoint.name, part)

    def release(self, checkpoint: Checkpoint | None) -> None:
        """Give up the weights of a checkpoint, unless it is the base, which the next ones need.

        With vLLM, which takes nearly all memory of a device, nothing may stay beside the next engine.
        """
        if self.config.backend == "vllm":
            for held in (checkpoint, self.base):
                if held is not None:
                    held.release()
        elif checkpoint is not None and checkpoint is not self.base:
            checkpoint.release()


def _digest_of(identity: dict[str, Any], name: str) -> dict[str, Any]:
    """The identity with one long value replaced by its hash."""
    return {**identity, name: hashlib.sha256(json.dumps(identity[name]).encode()).hexdigest()}


def _comparisons(run: _Run, verdicts: dict[str, Verdicts], values: dict[str, np.ndarray]) -> Iterator[Comparison]:
    """Every model after the first against the first."""
    requests, resampling = run.requests, run.config.resampling
    first, *others = verdicts
    for name in others:
        for (cell, condition), members in groups_of(requests).items():
            for metric in metrics_of([requests[member] for member in members]):
                this, other = (applicable(metric, requests, members, verdicts[model]) for model in (name, first))
                yield Comparison(
                    model=name,
                    other=first,
                    cell=cell,
                    condition=condition,
                    metric=metric,
                    difference=difference_of(this, other, resampling),
                )
        if name in values and run.same_pairs(name, first):
            this, other = prefers_chosen(values[name]), prefers_chosen(values[first])
            yield Comparison(
                model=name,
                other=first,
                cell=None,
                condition=None,
                metric="preference_accuracy",
                difference=difference_of(this, other, resampling),
            )
