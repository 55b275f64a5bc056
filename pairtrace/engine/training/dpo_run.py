"""One run of DPO: from the loaded checkpoint to the written one."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM
from trl import DPOConfig

from pairtrace.engine.checkpoint import load_config, load_model, resolve_dtype
from pairtrace.engine.cost import CostMeter
from pairtrace.engine.progress import Progress
from pairtrace.engine.training.arguments import adapter_of, computes_twice, trainer_arguments, use_device
from pairtrace.engine.training.batches import StepBatches
from pairtrace.engine.training.config import TrainConfig
from pairtrace.engine.training.cpu_head import head_for_cpu
from pairtrace.engine.training.job import Job
from pairtrace.engine.training.operations import Operations
from pairtrace.engine.training.pair_trainer import PairTrainer, drop_attention_mask, quiet_libraries
from pairtrace.engine.training.reference import ReferenceCache, reference_log_probabilities
from pairtrace.engine.training.rows import TrainingRows, read_rows
from pairtrace.engine.training.run_directory import COSTS, RunDirectory
from pairtrace.engine.training.saving import save_checkpoint
from pairtrace.engine.training.steps import ProgressCallback, Watch
from pairtrace.errors import ConfigError, PairtraceError, TrainingError

if TYPE_CHECKING:
    from pairtrace.engine.monitoring.callback import MonitorCallback
    from pairtrace.engine.pairs import PairSource

logger = logging.getLogger(__name__)

_METHOD = "dpo"
_REFERENCE_DIRECTORY = ".pairtrace-reference"
# Padded tokens of a forward pass of the reference.
_REFERENCE_TOKENS = {"cpu": 4096, "cuda": 32_768}
# What is kept of the trainer's log: its other figures are not measured on every device.
_LOGGED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "rewards/", "logps/", "probe/")
_DROPPED_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run leaves.

    Attributes:
        figures: for its summary.
        dropped: rows that were not trained on.
        log: the trainer's figures, every few steps.
    """

    figures: dict[str, Any]
    dropped: list[dict[str, Any]]
    log: list[dict[str, Any]]


def run_dpo(job: Job[PairSource], directory: RunDirectory, progress: Progress, watch: Watch | None = None) -> Outcome:
    """Train, and write the result to the `final` directory of the run.

    Args:
        job: what to train on what.
        directory: of the run.
        progress: receives its stages.
        watch: its figures go into the log.

    Raises:
        DataError: no row can be trained on.
        ModelError: the weights cannot be loaded.
        TrainingError: the loss or a gradient is not finite, or the monitor stopped training.
    """
    rows = _read_rows(job, progress)
    checkpoint = directory.last_checkpoint()
    stored = load_config(job.base)
    model = load_model(AutoModelForCausalLM, job.base, copy.deepcopy(stored), job.weights_dtype)
    configs = copy.deepcopy(stored), copy.deepcopy(model.generation_config)
    costs: dict[str, Any] = {"device": job.device, "path": directory.partial / COSTS, "resumed": True}
    with quiet_libraries(), head_for_cpu(model.config.get_text_config().vocab_size, job.device):
        run = _Run(job, rows, model, progress, watch)
        with CostMeter(method=_METHOD, stage="reference", **costs) as run.meter:
            trainer = run.trainer(model, directory)
        reference = run.meter.record
        with CostMeter(method=_METHOD, stage="train", **costs) as run.meter:
            progress.start("train", run.steps, "steps")
            if checkpoint is not None:
                logger.info("going on from %s", checkpoint)
                progress.advance(int(checkpoint.name.rpartition("-")[2]))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            progress.finish()
        if run.monitor is not None and run.monitor.stopped is not None:
            raise TrainingError(
                f"the monitor stopped training at step {run.monitor.stopped}: {run.monitor.alerts[-1]['text']}; see "
                f"{_monitor_directory(job.config)}. The step is saved: the same command without --monitor-stop goes on"
            )
        save_checkpoint(
            trainer.accelerator.unwrap_model(trainer.model),
            directory.final(),
            base=job.base,
            configs=configs,
            dtype=resolve_dtype(job.config.save_dtype, stored),
            merge=job.config.merge,
        )
    log = kept_log(trainer.state.log_history)
    figures = {
        "rows": job.source.rows,
        "trained": len(rows.pairs),
        "dropped": len(rows.dropped),
        "reasons": rows.reasons,
        "steps": int(trainer.state.global_step),
        "resumed_from": 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
        "reference_computed": run.computed,
        "reference_cached": 2 * len(rows.pairs) - run.computed,
        "tokens": run.meter.record.model_tokens,
        "flops": reference.flops + run.meter.record.flops,
        **losses_of(log, trainer.state.global_step),
        "last_accuracy": late_mean(log, trainer.state.global_step, "rewards/accuracies"),
    }
    return Outcome(figures=figures, dropped=rows.dropped_records(), log=log)


def _read_rows(job: Job[PairSource], progress: Progress) -> TrainingRows:
    rows = read_rows(job.source, job.renderer, progress)
    if rows.dropped:
        shown = "; ".join(f"row {row.row}: {row.reason}" for row in rows.dropped[:_DROPPED_SHOWN])
        more = "; ..." if len(rows.dropped) > _DROPPED_SHOWN else ""
        counted = f"{len(rows.dropped):,} of {job.source.rows:,} rows cannot be trained on"
        logger.warning("%s: %s%s", counted, shown, more)
    return rows


def kept_log(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a trainer's log about its steps, without figures that are not measured on every device."""
    return [
        {name: value for name, value in entry.items() if name.startswith(_LOGGED)}
        for entry in history
        if "loss" in entry
    ]


def losses_of(log: list[dict[str, Any]], steps: int) -> dict[str, float | None]:
    """The first loss, and the mean of the last ones."""
    return {"first_loss": float(log[0]["loss"]) if log else None, "last_loss": late_mean(log, steps, "loss")}


def late_mean(log: list[dict[str, Any]], steps: int, name: str) -> float | None:
    """Mean of a figure over the entries of the last tenth of the steps, the last entry in any case."""
    late = [entry for entry in log if entry["step"] > 0.9 * steps] or log[-1:]
    values = [float(entry[name]) for entry in late if name in entry]
    return sum(values) / len(values) if values else None


class _Run:
    """Brings the parts of a run together; what the trainer calls back for stands here.

    Attributes:
        meter: of the current stage.
        computed: sequences whose reference was computed.
        steps: optimizer steps of the whole run.
        monitor: watches the run; None where nothing is to be watched.
    """

    def __init__(
        self, job: Job[PairSource], rows: TrainingRows, model: Any, progress: Progress, watch: Watch | None
    ) -> None:
        self.meter: CostMeter
        self.computed = 0
        self._watch = watch
        self._job = job
        self._rows = rows
        self._progress = progress
        self.monitor = _monitor(job)
        config = job.config
        self._checkpointing = computes_twice(config, model, job.device)
        self._operations = Operations(
            model.config, *rows.lengths(), adapter=config.lora is not None, checkpointing=self._checkpointing
        )
        self._batches = StepBatches(
            self._operations.tokens.max(axis=1).tolist(),
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            seed=config.seed if config.data_seed is None else config.data_seed,
            group_by_length=config.group_by_length,
        )
        per_epoch = -(-len(rows.pairs) // config.batch_size)
        self.steps = config.max_steps or per_epoch * config.epochs

    def trainer(self, model: Any, directory: RunDirectory) -> PairTrainer:
        """The trainer of `model`, with its reference computed."""
        config = self._job.config
        drop_attention_mask(model)
        callback = ProgressCallback(self._progress)
        try:
            arguments = self._arguments(directory.partial)
            callback.trainer = PairTrainer(
                model,
                arguments,
                pairs=self._rows.pairs,
                batches=self._batches,
                reference_pass=self._reference,
                on_pass=self._count_pass,
                on_save=directory.seal_checkpoint,
                watch=self._watch,
                peft_config=adapter_of(config),
                processing_class=self._job.renderer.tokenizer,
                callbacks=[callback, *([] if self.monitor is None else [self.monitor])],
            )
        except PairtraceError:
            raise
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"TRL or peft refuses these settings: {error}") from error
        return callback.trainer

    def _arguments(self, output: Path) -> DPOConfig:
        config, device = self._job.config, self._job.device
        arguments = DPOConfig(
            beta=config.beta,
            loss_type=list(config.loss_type),
            loss_weights=list(config.loss_weights) or None,
            label_smoothing=config.label_smoothing,
            precompute_ref_log_probs=True,
            **trainer_arguments(
                config,
                output,
                steps=self.steps,
                device=device,
                bfloat16=self._job.bfloat16,
                checkpointing=self._checkpointing,
            ),
        )
        use_device(device, arguments)
        return arguments

    def _reference(self, compute: Any) -> Any:
        job = self._job
        root = Path(job.config.reference_cache or Path(job.config.out).parent / _REFERENCE_DIRECTORY)
        values, self.computed = reference_log_probabilities(
            self._rows.pairs,
            ReferenceCache(root, job.identity["model_fingerprint"], job.precision),
            compute,
            pad_token_id=job.renderer.tokenizer.pad_token_id or 0,
            token_budget=_REFERENCE_TOKENS[job.device.type],
            progress=self._progress,
            on_batch=self._count_reference,
        )
        return values

    def _count_reference(self, sides: list[tuple[int, int]]) -> None:
        tokens, flops = self._operations.reference(sides)
        self.meter.add(tokens=tokens, flops=flops)

    def _count_pass(self, indices: list[int]) -> None:
        tokens, flops = self._operations.training(indices)
        self.meter.add(tokens=tokens, flops=flops)


def _monitor_directory(config: TrainConfig) -> str:
    return f"{config.out}.monitor"


def _monitor(job: Job[PairSource]) -> MonitorCallback | None:
    config = job.config
    if config.monitor is None:
        return None
    from pairtrace.engine.monitoring.callback import MonitorCallback
    from pairtrace.engine.monitoring.config import MonitorConfig

    settings = MonitorConfig(
        base=config.model,
        prompts=config.monitor,
        out=_monitor_directory(config),
        known=config.monitor_known,
        rules=config.monitor_rules,
        on_alert="stop" if config.monitor_stop else "log",
        max_length=config.max_length or 0,
        truncation=config.truncation,
        chat_template=config.chat_template,
        template_date=config.template_date,
    )
    return MonitorCallback(settings, steps=config.monitor_steps)
