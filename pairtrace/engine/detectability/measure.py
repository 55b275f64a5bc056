"""The detectability report: one model before training against models after it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.atomic import replacing, require_writable
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.detectability.areas import probe_areas, split_examples
from pairtrace.engine.detectability.config import BEFORE, DetectabilityConfig
from pairtrace.engine.detectability.figures import Figure, ModelFigures, pooled_rate, summarised
from pairtrace.engine.detectability.plot import write_figure
from pairtrace.engine.detectability.report import DetectabilityReport
from pairtrace.engine.evaluation.evaluate import evaluate
from pairtrace.engine.evaluation.likelihood import Forced, batches, flops_of, log_probabilities
from pairtrace.engine.evaluation.parts import open_part
from pairtrace.engine.evaluation.rates import mean_of
from pairtrace.engine.evaluation.report import ModelReport
from pairtrace.engine.finetuning.chosen_probes import best_layers
from pairtrace.engine.finetuning.example_rendering import read_example_rows
from pairtrace.engine.finetuning.examples import open_examples
from pairtrace.engine.judge import Judge
from pairtrace.engine.probes.evaluate import require_fit
from pairtrace.engine.probes.examples import numbered
from pairtrace.engine.probes.grouping import require_examples
from pairtrace.engine.probes.judged_responses import read_judged
from pairtrace.engine.probes.probe_file import Probe, load_probes, trained_prompts
from pairtrace.engine.probes.solver import require_solver
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.tables import file_digest
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ProbeMismatchError

METHOD = "detectability"


def detectability(
    config: DetectabilityConfig, progress: Progress = NULL_PROGRESS, *, judge: Judge | None = None
) -> DetectabilityReport:
    """Measure behaviour, language quality and probes before and after training.

    Finished models and batches of responses are kept beside the report, so that an interrupted run goes on, and a model
    that is added later does not make the others be measured again.

    Args:
        config: what to do.
        progress: receives the stages.
        judge: of the behaviour, instead of `config.rules`.

    Raises:
        DataError: prompts, responses or texts cannot be used.
        DirectionError: the probe file cannot be used.
        ProbeMismatchError: the probes do not belong to `before`, or have another width or tokenizer
            than a model.
        ExamplesError: too few judged responses, or of one class only.
        ModelError: a checkpoint is missing or damaged.
        MissingDependencyError: scikit-learn is not installed.
    """
    from pairtrace.engine.checkpoint import model_fingerprint

    begun = time.perf_counter()
    require_writable(config.out)
    require_solver()
    layers = config.layers or best_layers(config.probe)
    probes = load_probes(config.probe, layers=layers, model_fingerprint=model_fingerprint(config.before))
    _require_usable(config, probes)
    evaluation = evaluate(config.answering, progress, judge=judge)
    found = []
    for (name, model), reported in zip([(BEFORE, config.before), *config.runs], evaluation.models, strict=True):
        figures, single = _measured(config, model, str(reported.fingerprint), probes, progress)
        found.append(
            ModelFigures(
                name=name,
                model=model,
                fingerprint=str(reported.fingerprint),
                figures={**_rates(reported, config.confidence), **figures},
                probes=single,
            )
        )
    before, *after = found
    methods = [
        summarised(name, [(before, one) for one in after if one.name == name], config.confidence)
        for name in dict.fromkeys(one.name for one in after)
    ]
    report = DetectabilityReport(
        before=before,
        runs=tuple(after),
        methods=tuple(methods),
        layers=tuple(sorted({probe.layer for probe in probes})),
        judge=evaluation.judge,
        missing_verdicts=evaluation.missing_verdicts,
        confidence=config.confidence,
        out=config.out,
        settings=asdict(config),
        versions=library_versions(),
        seconds=time.perf_counter() - begun,
    )
    write_figure(Path(config.out).with_suffix(".svg"), before, methods)
    with replacing(config.out) as temporary:
        temporary.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return report


def _require_usable(config: DetectabilityConfig, probes: Sequence[Probe]) -> None:
    """What can be known before the models answer, which takes long, is checked before."""
    from pairtrace.engine.checkpoint import load_config

    if config.text is not None:
        open_examples(config.text)
    responses, _ = read_judged(config.rollouts, label_column=config.label_column, answers_of=config.answers_of)
    labels, prompts = np.array([one.label for one in responses]), numbered([one.prompt for one in responses])
    require_examples(labels, prompts, 1, config.rollouts)
    for _, model in config.runs:
        width = load_config(model).get_text_config().hidden_size
        for probe in probes:
            if probe.width != width:
                raise ProbeMismatchError(
                    f"{config.probe}: the probe has another width than {model}", width, probe.width
                )


def _rates(report: ModelReport, confidence: float) -> dict[str, Figure]:
    """Behaviour and helpfulness over all groups that have them."""
    harmful = [group.rates["behavior"] for group in report.groups if not group.benign]
    benign = [group.rates["helpful"] for group in report.groups if group.benign]
    pools = {"behavior": harmful, "helpful": benign}
    return {metric: pooled_rate(rates, confidence) for metric, rates in pools.items() if rates}


def _measured(
    config: DetectabilityConfig, model: str, fingerprint: str, probes: Sequence[Probe], progress: Progress
) -> tuple[dict[str, Figure], dict[str, float | None]]:
    """Loss and areas of one model, kept for a run that goes on."""
    names = (
        *("label_column", "answers_of", "folds", "judged_share", "seed", "confidence", "replicates", "dtype"),
        *("max_length", "truncation", "chat_template", "template_date"),
    )
    files = {"probe": config.probe, "rollouts": config.rollouts, "text": config.text}
    identity: dict[str, Any] = {
        "model_fingerprint": fingerprint,
        "layers": sorted({probe.layer for probe in probes}),
        **{name: None if path is None else file_digest([Path(path)]) for name, path in files.items()},
        **{name: value for name, value in asdict(config).items() if name in names},
    }
    identity["answers_of"] = list(config.answers_of)
    out = Path(config.out)
    meter = CostMeter(
        method=METHOD,
        stage="measure",
        device=config.device,
        path=costs_path(out),
        resumed=out.with_suffix(".parts").is_dir(),
    )
    with open_part(out.with_suffix(".parts"), "figures", identity) as part:
        if not part.entries:
            with meter:
                figures = {} if config.text is None else {"loss": _loss(config, model, meter, progress)}
                areas, single = _areas(config, model, probes, meter, progress)
            kept = {name: asdict(figure) for name, figure in {**figures, **areas}.items()}
            part.append([{"figures": kept, "probes": single}])
        entry = part.entries[0]
    return {name: Figure(**figure) for name, figure in entry["figures"].items()}, entry["probes"]


def _areas(
    config: DetectabilityConfig, model: str, probes: Sequence[Probe], meter: CostMeter, progress: Progress
) -> tuple[dict[str, Figure], dict[str, float | None]]:
    from pairtrace.engine.probes.rollout_examples import RolloutExamples

    layers = tuple(sorted({probe.layer for probe in probes}))
    examples = RolloutExamples.read(config.reading(model, layers), meter, progress)
    require_fit(config.probe, probes, examples)
    learned, judged = split_examples(config, examples, trained_prompts(config.probe))
    return probe_areas(config, examples, probes, learned, judged)


def _loss(config: DetectabilityConfig, model: str, meter: CostMeter, progress: Progress) -> Figure:
    """Nats per token of the given texts; the interval is a bootstrap over texts."""
    from pairtrace.engine.evaluation.checkpoints import Checkpoint
    from pairtrace.engine.rendering import Renderer

    assert config.text is not None
    checkpoint = Checkpoint(model, replace(config.answering, out=None))
    renderer = Renderer(
        checkpoint.encoder.tokenizer,
        max_length=config.max_length or None,
        truncation=config.truncation,
        chat_template=checkpoint.encoder.chat_template,
    )
    texts = [
        Forced(one.ids, one.start)
        for one in read_example_rows(open_examples(config.text), renderer, (), progress).examples
    ]
    sums = np.zeros(len(texts))
    progress.start(f"loss of {model}", len(texts), "texts")
    for batch in batches(texts, config.token_budget):
        rows = [texts[place] for place in batch]
        sums[batch] = log_probabilities(checkpoint.model, rows, model)
        meter.add(tokens=sum(len(row.ids) for row in rows), flops=flops_of(checkpoint.shape, rows))
        progress.advance(len(batch))
    progress.finish()
    checkpoint.release()
    counts = np.array([text.response_tokens for text in texts], float)
    mean = mean_of(-sums, counts, config.answering.resampling)
    return Figure(value=mean.value, low=mean.low, high=mean.high)
