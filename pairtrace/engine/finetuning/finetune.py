"""Fine-tuning against probes, and its controls."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairtrace.engine.atomic import replacing, require_writable
from pairtrace.engine.finetuning.config import FinetuneConfig
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.training.run_directory import RunDirectory
from pairtrace.engine.training.train import require_training, total_costs, train, training_process
from pairtrace.errors import ConfigError

if TYPE_CHECKING:
    from pairtrace.engine.finetuning.chosen_probes import ChosenProbes
    from pairtrace.engine.finetuning.signals import ProbeSignal, ResponseSignal

RECORD = "pairtrace_finetune.json"


@dataclass(frozen=True, kw_only=True)
class FinetuneSummary:
    """What a run did.

    Attributes:
        out: directory of the trained checkpoint.
        method, signal: as asked for.
        trained_against: probes, as name/layer.
        watched: probes that were looked at and had no part in the training.
        pairs: of "dpo", what became of the sampled responses (`sampled_pairs.PairChoice`); None for "sft".
        preferences: of "dpo", the file of the pairs.
        training: of "dpo", the summary of the preference training (`TrainSummary`); of "sft" its counterpart: rows,
            trained, dropped, reasons, steps, resumed_from, first_loss, last_loss, tokens, flops, all_processes.
        probabilities: of every probe that was looked at, the mean probability over the responses of the first and of
            the last entry of the log: [first, last]. Of "dpo", over chosen and over rejected responses.
        seconds: wall time of this process, loading included.
        settings: that decide the weights.
        already_complete: nothing was left to do.
    """

    out: str
    method: str
    signal: str
    trained_against: list[str]
    watched: list[str]
    pairs: dict[str, Any] | None
    preferences: str | None
    training: dict[str, Any]
    probabilities: dict[str, list[float]]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    already_complete: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def finetune(config: FinetuneConfig, progress: Progress = NULL_PROGRESS) -> FinetuneSummary:
    """Fine-tune a checkpoint against a probe or a control, going on where an interrupted run stopped.

    Args:
        config: what to do.
        progress: receives the stages of the run.

    Raises:
        ConfigError: the output exists and is of another run, or an unfinished run had other settings.
        DataError: the data cannot be read, or nothing of it can be trained on: no responses differ for the signal.
        DirectionError: the probe file cannot be used.
        ProbeMismatchError: its probes belong to another model, tokenizer, width or layer.
        MissingDependencyError: the extra `train` is not installed.
        ModelError: the checkpoint, its tokenizer or the classifier cannot be used.
        TrainingError: the loss or a gradient is not finite, or memory does not suffice.
    """
    require_training()
    require_writable(Path(config.out) / RECORD)
    return (_finetune_sft if config.method == "sft" else _finetune_dpo)(config, progress)


def _finetune_sft(config: FinetuneConfig, progress: Progress) -> FinetuneSummary:
    from pairtrace.engine.finetuning.chosen_probes import ChosenProbes
    from pairtrace.engine.finetuning.sft_run import run_sft
    from pairtrace.engine.finetuning.signals import control_signal
    from pairtrace.engine.training.job import Job

    begun = time.perf_counter()
    directory = RunDirectory(config.out, "finetune")
    job = Job.prepare(config, config.open_responses)
    prints = job.identity["model_fingerprint"], job.identity["tokenizer_fingerprint"]
    probes = ChosenProbes.of(config, *prints)
    signal = control_signal(config)
    if config.imitate_below is not None:
        signal = _probe_signal(config, probes, config.data)
    job = replace(job, identity={**job.identity, **_signal_identity(probes, signal)})
    done = directory.finished(job.identity)
    if done is not None:
        return FinetuneSummary(**{**done["summary"], "already_complete": True})
    lock = directory.begin(job.identity)
    try:
        with training_process(config.threads):
            outcome = run_sft(job, config, probes, signal, directory, progress)
        summary = _summary(
            config,
            probes,
            training={**outcome.figures, "all_processes": total_costs(directory)},
            log=outcome.log,
            seconds=time.perf_counter() - begun,
        )
        record = {
            "summary": summary.to_dict(),
            "identity": job.identity,
            "versions": job.versions,
            "dropped": outcome.dropped,
            "log": outcome.log,
        }
        directory.publish(record)
    finally:
        lock.release()
    return summary


def _finetune_dpo(config: FinetuneConfig, progress: Progress) -> FinetuneSummary:
    from pairtrace.engine.checkpoint import model_fingerprint, require_whole_weights, resolve_checkpoint
    from pairtrace.engine.finetuning.chosen_probes import ChosenProbes
    from pairtrace.engine.finetuning.probe_watch import ProbeWatch
    from pairtrace.engine.finetuning.sampled_pairs import write_pairs
    from pairtrace.engine.finetuning.signals import control_signal
    from pairtrace.engine.prompt_encoder import PromptEncoder
    from pairtrace.engine.prompts import load_prompts
    from pairtrace.engine.versions import library_versions

    begun = time.perf_counter()
    require_whole_weights(resolve_checkpoint(config.model))
    encoder = PromptEncoder.load(config.model, chat_template=config.chat_template, template_date=config.template_date)
    prints = model_fingerprint(config.model), str(encoder.identity["tokenizer_fingerprint"])
    probes = ChosenProbes.of(config, *prints)
    preferences = Path(f"{config.out}.preferences.jsonl")
    signal = control_signal(config)
    if probes.trained:
        signal = _probe_signal(config, probes, str(preferences))
    identity = {
        **config.identity(),
        "model_fingerprint": prints[0],
        **encoder.identity,
        "prompts_fingerprint": load_prompts(config.data, mixed=True).fingerprint,
        **_signal_identity(probes, signal),
    }
    done = _finished(config.out, identity)
    if done is not None:
        return done
    choice = write_pairs(config, preferences, signal, identity, progress)
    watch = ProbeWatch((*probes.trained, *probes.watched)) if probes.layers else None
    training = train(config.train_config(str(preferences)), progress, watch=watch)
    log = json.loads((Path(config.out) / "pairtrace_train.json").read_text(encoding="utf-8"))["log"]
    summary = _summary(
        config,
        probes,
        training={name: value for name, value in training.to_dict().items() if name != "settings"},
        log=log,
        seconds=time.perf_counter() - begun,
        pairs=choice.to_dict(),
        preferences=str(preferences),
    )
    record = {"summary": summary.to_dict(), "identity": identity, "versions": library_versions(), "log": log}
    with replacing(Path(config.out) / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return summary


def _finished(out: str, identity: dict[str, Any]) -> FinetuneSummary | None:
    """The summary of the finished run; a directory that `train` has finished, without a record yet, is none."""
    path = Path(out)
    if path.exists() and not (path / RECORD).exists() and (path / "pairtrace_train.json").exists():
        return None
    done = RunDirectory(out, "finetune").finished(identity)
    return None if done is None else FinetuneSummary(**{**done["summary"], "already_complete": True})


def _probe_signal(config: FinetuneConfig, probes: ChosenProbes, responses: str) -> ProbeSignal:
    """The probes that are trained against, as they rate the untrained model's activations."""
    from pairtrace.engine.finetuning.signals import ProbeSignal
    from pairtrace.engine.probes.config import ExamplesConfig
    from pairtrace.engine.probes.rollout_examples import ResponseReader

    reading = ExamplesConfig(
        rollouts=responses,
        model=config.model,
        layers=tuple(sorted({probe.layer for probe in probes.trained})),
        device=config.device,
        max_length=config.max_length or 0,
        truncation=config.truncation,
        chat_template=config.chat_template,
        template_date=config.template_date,
    )
    return ProbeSignal(probes=probes.trained, digest=probes.digest, reader=ResponseReader.prepare(reading))


def _signal_identity(probes: ChosenProbes, signal: ResponseSignal | None) -> dict[str, Any]:
    identity: dict[str, Any] = {} if signal is None else dict(signal.identity)
    if probes.trained:
        # Probes that are only looked at do not decide the weights.
        identity |= {"probe_digest": probes.digest, "probes": _names(probes.trained)}
    return identity


def _names(probes: Any) -> list[str]:
    return [f"{probe.name}/{probe.layer}" for probe in probes]


def _summary(
    config: FinetuneConfig,
    probes: ChosenProbes,
    *,
    training: dict[str, Any],
    log: list[dict[str, Any]],
    seconds: float,
    pairs: dict[str, Any] | None = None,
    preferences: str | None = None,
) -> FinetuneSummary:
    if not log:
        raise ConfigError(f"the training of {config.out} has left no log; remove {config.out} and train again")
    looked_at = [name for name in log[0] if name.startswith("probe/")]
    trained = probes.trained if config.method == "dpo" or config.probe_weight > 0 else ()
    return FinetuneSummary(
        out=str(config.out),
        method=config.method,
        signal=config.signal,
        trained_against=_names(trained),
        watched=_names(probes.watched if trained else (*probes.trained, *probes.watched)),
        pairs=pairs,
        preferences=preferences,
        training=training,
        probabilities={name.removeprefix("probe/"): [log[0][name], log[-1][name]] for name in looked_at},
        seconds=seconds,
        settings=config.identity(),
    )
