"""One supervised run against probes: from the loaded checkpoint to the written one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from pairtrace.engine.checkpoint import load_config, load_model, resolve_dtype
from pairtrace.engine.cost import CostMeter
from pairtrace.engine.finetuning.chosen_probes import ChosenProbes
from pairtrace.engine.finetuning.config import FinetuneConfig
from pairtrace.engine.finetuning.example_rendering import ExampleRows, read_example_rows
from pairtrace.engine.finetuning.examples import ExampleSource
from pairtrace.engine.finetuning.probe_watch import ProbeWatch
from pairtrace.engine.finetuning.response_trainer import ResponseTrainer
from pairtrace.engine.finetuning.signals import ResponseSignal
from pairtrace.engine.probes.hooks import decoder_of
from pairtrace.engine.probes.term import ProbeTerm
from pairtrace.engine.progress import Progress
from pairtrace.engine.rendered import Quarantined
from pairtrace.engine.training.arguments import adapter_of, computes_twice, trainer_arguments, use_device
from pairtrace.engine.training.batches import StepBatches
from pairtrace.engine.training.cpu_head import head_for_cpu
from pairtrace.engine.training.dpo_run import Outcome, kept_log, losses_of
from pairtrace.engine.training.job import Job
from pairtrace.engine.training.operations import Operations
from pairtrace.engine.training.pair_trainer import drop_attention_mask, quiet_libraries
from pairtrace.engine.training.run_directory import COSTS, RunDirectory
from pairtrace.engine.training.saving import save_checkpoint
from pairtrace.engine.training.steps import ProgressCallback
from pairtrace.errors import ConfigError, DataError, PairtraceError

logger = logging.getLogger(__name__)

METHOD = "finetune"


def run_sft(
    job: Job[ExampleSource],
    config: FinetuneConfig,
    probes: ChosenProbes,
    signal: ResponseSignal | None,
    directory: RunDirectory,
    progress: Progress,
) -> Outcome:
    """Train, and write the result to the `final` directory of the run.

    Args:
        job: what to train on what.
        config: the settings of `job`.
        probes: to train against and to look at.
        signal: a control, which leaves out given responses instead, or what tells which of them are imitated; None for
            neither.
        directory: of the run.
        progress: receives its stages.

    Raises:
        DataError: no row can be used.
        ModelError: the weights cannot be loaded.
        TrainingError: the loss or a gradient is not finite.
    """
    costs: dict[str, Any] = {"device": job.device, "path": directory.partial / COSTS, "resumed": True}
    selected: list[Quarantined] = []
    if signal is not None:
        with CostMeter(method=METHOD, stage="select", **costs) as meter:
            selected = list(_selected(job.source, signal, config, meter, progress))
    against_probe = config.signal == "probe"
    rows = read_example_rows(job.source, job.renderer, [] if against_probe else selected, progress)
    not_imitated = {one.row for one in selected} if against_probe else set()
    imitated = np.array([example.row not in not_imitated for example in rows.examples])
    if not imitated.any():
        raise DataError(
            f"none of the {len(imitated):,} responses can be imitated: the probe gives all of them "
            f"{config.imitate_below} or more, --imitate-below; raise it"
        )
    checkpoint = directory.last_checkpoint()
    stored = load_config(job.base)
    model = load_model(AutoModelForCausalLM, job.base, copy.deepcopy(stored), job.weights_dtype)
    configs = copy.deepcopy(stored), copy.deepcopy(model.generation_config)
    resumed_from = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    with (
        quiet_libraries(),
        head_for_cpu(model.config.get_text_config().vocab_size, job.device),
        CostMeter(method=METHOD, stage="train", **costs) as meter,
    ):
        trainer, steps = _trainer(job, config, probes, rows, imitated, model, directory, meter, progress)
        progress.start("train", steps, "steps")
        if checkpoint is not None:
            logger.info("going on from %s", checkpoint)
            progress.advance(resumed_from)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        progress.finish()
        save_checkpoint(
            trainer.accelerator.unwrap_model(trainer.model),
            directory.final(),
            base=job.base,
            configs=configs,
            dtype=resolve_dtype(config.save_dtype, stored),
            merge=config.merge,
        )
    log = kept_log(trainer.state.log_history)
    done = int(trainer.state.global_step)
    figures = {
        "rows": job.source.rows,
        "trained": len(rows.examples),
        "imitated": int(imitated.sum()),
        "dropped": len(rows.dropped),
        "reasons": rows.reasons,
        "steps": done,
        "resumed_from": resumed_from,
        "tokens": meter.record.model_tokens,
        "flops": meter.record.flops,
        **losses_of(log, done),
    }
    return Outcome(figures=figures, dropped=rows.dropped_records(), log=log)


def _selected(
    source: ExampleSource, signal: ResponseSignal, config: FinetuneConfig, meter: CostMeter, progress: Progress
) -> Iterator[Quarantined]:
    """The rows that show the behaviour, or of which the signal knows nothing."""
    threshold = config.threshold if config.imitate_below is None else config.imitate_below
    examples = [example for example in source.read() if not example.problem and example.response.strip()]
    texts = [example.row for example in examples if isinstance(example.prompt, str)]
    if config.signal == "probe" and texts:
        raise DataError(
            f"--imitate-below reads responses as answers in a conversation, but the prompt of row {texts[0]} is plain "
            "text; give the prompts as messages"
        )
    conversations, responses = [one.conversation for one in examples], [one.response for one in examples]
    rated = signal.probabilities(conversations, responses, meter, progress)
    for example, value in zip(examples, rated.tolist(), strict=True):
        if np.isnan(value):
            yield Quarantined(row=example.row, source="", reason=f"without_verdict: the {config.signal} gives none")
        elif value >= threshold:
            reason = f"shows_behavior: the {config.signal} gives it {value:.3f}, the threshold is {threshold}"
            yield Quarantined(row=example.row, source="", reason=reason)


def _trainer(
    job: Job[ExampleSource],
    config: FinetuneConfig,
    probes: ChosenProbes,
    rows: ExampleRows,
    imitated: np.ndarray,
    model: Any,
    directory: RunDirectory,
    meter: CostMeter,
    progress: Progress,
) -> tuple[ResponseTrainer, int]:
    """The trainer and its number of steps."""
    drop_attention_mask(model)
    if probes.layers:
        decoder_of(model)  # an architecture whose blocks are not known is refused before the first step
    tokens, responses = rows.lengths()
    twice = computes_twice(config, model, job.device)
    operations = Operations(model.config, tokens, responses, adapter=config.lora is not None, checkpointing=twice)
    batches = StepBatches(
        tokens[:, 0].tolist(),
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        seed=config.seed if config.data_seed is None else config.data_seed,
        group_by_length=config.group_by_length,
    )
    steps = config.max_steps or -(-len(rows.examples) // config.batch_size) * config.epochs
    # At weight 0 the term has no part, not even one that is multiplied by 0: the run is plain fine-tuning to the bit.
    term = ProbeTerm(probes.trained) if probes.trained and config.probe_weight > 0 else None
    callback = ProgressCallback(progress)

    def count(indices: list[int]) -> None:
        passed, flops = operations.training(indices)
        meter.add(tokens=passed, flops=flops)

    try:
        arguments = _arguments(job, config, directory.partial, steps, twice)
        callback.trainer = trainer = ResponseTrainer(
            model,
            arguments,
            examples=rows.examples,
            imitated=imitated,
            batches=batches,
            term=term,
            weight=config.probe_weight,
            watch=ProbeWatch((*probes.trained, *probes.watched)) if probes.layers else None,
            on_pass=count,
            on_save=directory.seal_checkpoint,
            peft_config=adapter_of(config),
            processing_class=job.renderer.tokenizer,
            callbacks=[callback],
        )
    except PairtraceError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"TRL or peft refuses these settings: {error}") from error
    return trainer, steps


def _arguments(
    job: Job[ExampleSource], config: FinetuneConfig, output: Path, steps: int, checkpointing: bool
) -> SFTConfig:
    shared = trainer_arguments(
        config, output, steps=steps, device=job.device, bfloat16=job.bfloat16, checkpointing=checkpointing
    )
    arguments = SFTConfig(completion_only_loss=True, packing=False, **shared)
    use_device(job.device, arguments)
    return arguments
