"""The steering check: does a model show a behaviour more, the further it is pushed along the behaviour's vector?

The cheap validation that a vector means what its name says. Every arm answers the same requests with the same random
numbers, so that differences are paired.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from pairtrace.engine.architectures import check_layers
from pairtrace.engine.atomic import replacing, require_writable
from pairtrace.engine.checkpoint import load_config
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.evaluation.checkpoints import Checkpoint, PromptTokens
from pairtrace.engine.evaluation.drift import forced_answers
from pairtrace.engine.evaluation.likelihood import Forced, batches, flops_of, log_probabilities
from pairtrace.engine.evaluation.parts import Part, open_part
from pairtrace.engine.evaluation.rates import Mean, difference_of, mean_of
from pairtrace.engine.evaluation.requests import requests_of
from pairtrace.engine.evaluation.responses import Answers, responses_identity, sample_answers
from pairtrace.engine.evaluation.verdicts import (
    Verdicts,
    applicable,
    groups_of,
    judge_answers,
    rates_by_group,
    write_responses,
)
from pairtrace.engine.judge import Judge, load_rules
from pairtrace.engine.probes.hooks import changed_everywhere, changed_layer, require_blocks
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.prompts import load_prompts
from pairtrace.engine.steering.arms import Arm, Steering, arms_of, load_vectors
from pairtrace.engine.steering.config import SteerConfig
from pairtrace.engine.steering.norms import mean_norms
from pairtrace.engine.steering.report import ArmReport, SteerReport
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ModelError

METHOD = "steering"


def steer(config: SteerConfig, progress: Progress = NULL_PROGRESS, *, judge: Judge | None = None) -> SteerReport:
    """Let a model answer while it is steered, and measure the behaviour.

    Every finished batch is kept beside the report, so that an interrupted run goes on where it stopped, and one with
    other scales, layers or controls only answers what is new.

    Args:
        config: what to do.
        progress: receives a stage per arm.
        judge: of the behaviour, instead of `config.rules`.

    Raises:
        DataError: the prompts cannot be used.
        DirectionError, LayerError: the direction file cannot be used, or belongs to another width or tokenizer.
        ModelError: the checkpoint is missing or damaged, or of an architecture that cannot be steered.
        ConfigError: an option cannot be used.
    """
    begun = time.perf_counter()
    require_writable(config.out)
    refusal_judge = load_rules(config.refusal_rules)
    judge = judge or load_rules(config.rules)
    run = _Run(config, progress)
    answers: dict[str, Answers] = {}
    verdicts: dict[str, Verdicts] = {}
    reports: list[ArmReport] = []
    for arm in run.arms:
        answers[arm.name] = run.answers(arm)
        verdicts[arm.name] = judge_answers(run.requests, answers[arm.name], judge, refusal_judge)
        reports.append(run.report(arm, answers[arm.name], verdicts))
    run.checkpoint.release()
    prints = {vector.model_fingerprint for vector in run.vectors}
    result = SteerReport(
        model=config.model,
        fingerprint=run.checkpoint.fingerprint,
        behavior=run.vectors[0].name,
        same_model=None if None in prints else prints == {run.checkpoint.fingerprint},
        norms=run.norms,
        judge=judge.name,
        missing_verdicts=sum(group.rates["behavior"].missing for report in reports for group in report.groups),
        arms=tuple(reports),
        confidence=config.confidence,
        out=config.out,
        settings=asdict(config),
        versions=library_versions(),
        seconds=time.perf_counter() - begun,
    )
    write_responses(config.beside(".responses.parquet"), run.requests, answers, verdicts)
    with replacing(config.out) as temporary:
        temporary.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    return result


class _Run:
    """What the arms share; everything that could stop them later is checked here."""

    def __init__(self, config: SteerConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.answering = config.answering
        self.prompts = load_prompts(config.prompts, mixed=True)
        self.requests = requests_of(self.prompts, config.conditions)
        self.checkpoint = Checkpoint(config.model, self.answering)
        self._tokens = PromptTokens(self.requests, config.max_new_tokens)
        self._tokens.of(self.checkpoint.encoder)
        model_config = load_config(config.model)
        require_blocks(model_config)
        width = int(model_config.hidden_size)
        self.vectors = load_vectors(config, self.checkpoint.tokenizer_fingerprint, width)
        check_layers(tuple(vector.layer for vector in self.vectors if vector.layer is not None), model_config)
        self.arms = arms_of(config, self.vectors)
        self.norms: dict[int, float] = {}
        self._folder = config.beside(".parts")
        self._resumed = self._folder.is_dir()
        self._metered: set[str] = set()

    @contextmanager
    def _stage(self, stage: str, identity: dict[str, Any]) -> Iterator[tuple[Part, CostMeter]]:
        meter = CostMeter(
            method=METHOD,
            stage=stage,
            device=self.config.device,
            path=costs_path(self.config.out),
            resumed=self._resumed or stage in self._metered,
        )
        self._metered.add(stage)
        with open_part(self._folder, stage, identity) as part, meter:
            yield part, meter

    def _identity(self, arm: Arm) -> dict[str, Any]:
        """What decides the answers of an arm."""
        identity = responses_identity(self.answering, self.checkpoint, self.prompts.fingerprint)
        return {**identity, "steering": arm.identity(self.norms, self.config.positions)}

    def answers(self, arm: Arm) -> Answers:
        """What the model says under an arm; the unsteered one, which comes first, also gives the norms."""
        with self._stage("responses", self._identity(arm)) as (part, meter), self._steered(arm):
            given = sample_answers(
                self.answering,
                self.checkpoint,
                self.requests,
                self._tokens,
                part,
                meter,
                self.progress,
                title=arm.name,
            )
        if arm.mode == "none" and any(one.scale is not None for one in self.arms):
            self.norms = self._measured(given)
        return given

    @contextmanager
    def _steered(self, arm: Arm) -> Iterator[None]:
        if arm.unit is None or arm.layer is None:
            yield
            return
        length = None if arm.scale is None else arm.scale * self.norms[arm.layer]
        model, change = self.checkpoint.model, Steering(arm.unit, length, self.config.positions, arm.left)
        with changed_everywhere(model, change) if arm.everywhere else changed_layer(model, arm.layer, change):
            yield

    def _measured(self, answers: Answers) -> dict[int, float]:
        """Mean norms on the unsteered answers; kept, so that a resumed run adds vectors of the very same length."""
        rows = [row for row in self._forced(answers) if row.response_tokens][: self.config.norm_responses]
        layers = [vector.layer for vector in self.vectors if vector.layer is not None]
        if not rows:
            raise ModelError(f"{self.config.model} answers nothing: no token to take the norm of the stream from")
        identity = {**self._identity(self.arms[0]), "layers": layers, "responses": len(rows)}
        with self._stage("norms", identity) as (part, meter):
            if not part.entries:
                found = mean_norms(self.checkpoint.model, rows, layers, self.config.token_budget)
                part.append([{"norms": list(found.values())}])
                meter.add(tokens=sum(len(row.ids) for row in rows))
            return dict(zip(layers, part.entries[0]["norms"], strict=True))

    def report(self, arm: Arm, answers: Answers, verdicts: dict[str, Verdicts]) -> ArmReport:
        """Rates of an arm, and differences from the unsteered one."""
        resampling = self.answering.resampling
        differences = []
        if arm.mode != "none":
            for members in groups_of(self.requests).values():
                this, other = (
                    applicable("behavior", self.requests, members, verdicts[name])
                    for name in (arm.name, self.arms[0].name)
                )
                differences.append(difference_of(this, other, resampling))
        return ArmReport(
            name=arm.name,
            direction=arm.direction,
            control=arm.control,
            layer=arm.layer,
            mode=arm.mode,
            everywhere=arm.everywhere,
            scale=arm.scale,
            left=arm.left,
            length=None if arm.scale is None or arm.layer is None else arm.scale * self.norms[arm.layer],
            groups=rates_by_group(self.requests, answers, verdicts[arm.name], resampling),
            differences=tuple(differences),
            surprise=self._surprise(arm, answers),
        )

    def _surprise(self, arm: Arm, answers: Answers) -> Mean:
        rows = self._forced(answers)
        with self._stage("surprise", {**self._identity(arm), "samples": self.config.samples}) as (part, meter):
            known = {
                place: value
                for entry in part.entries
                for place, value in zip(entry["places"], entry["values"], strict=True)
            }
            places = [place for place in range(len(rows)) if place not in known and rows[place].response_tokens]
            model, shape = self.checkpoint.model, self.checkpoint.shape
            for batch in batches([rows[place] for place in places], self.config.token_budget):
                found = [places[number] for number in batch]
                chosen = [rows[place] for place in found]
                values = log_probabilities(model, chosen, self.config.model)
                known |= dict(zip(found, values, strict=True))
                part.append([{"places": found, "values": values}])
                meter.add(tokens=sum(len(row.ids) for row in chosen), flops=flops_of(shape, chosen))
        of_request = np.repeat(np.arange(len(answers)), [len(samples) for samples in answers])
        totals = np.bincount(of_request, [-known.get(place, 0.0) for place in range(len(rows))])
        counts = np.bincount(of_request, [row.response_tokens for row in rows])
        return mean_of(totals, counts, self.answering.resampling)

    def _forced(self, answers: Answers) -> list[Forced]:
        return [row for samples in forced_answers(self.checkpoint, self._tokens, answers) for row in samples]
