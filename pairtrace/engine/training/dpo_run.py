"""One run of DPO: from the loaded checkpoint to the written one."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from pairtrace.engine.checkpoint import load_config, load_model, resolve_dtype
from pairtrace.engine.cost import CostMeter
from pairtrace.engine.progress import Progress
from pairtrace.engine.training.batches import StepBatches
from pairtrace.engine.training.config import SCHEDULERS, TrainConfig
from pairtrace.engine.training.cpu_head import head_for_cpu
from pairtrace.engine.training.job import Job
from pairtrace.engine.training.operations import Operations
from pairtrace.engine.training.pair_trainer import (
    PairTrainer,
    ProgressCallback,
    drop_attention_mask,
    quiet_libraries,
)
from pairtrace.engine.training.reference import ReferenceCache, reference_log_probabilities
from pairtrace.engine.training.rows import TrainingRows, read_rows
from pairtrace.engine.training.run_directory import COSTS, RunDirectory
from pairtrace.engine.training.saving import save_checkpoint
from pairtrace.errors import ConfigError, PairtraceError, TrainingError

if TYPE_CHECKING:
    from pairtrace.engine.monitoring.callback import MonitorCallback

logger = logging.getLogger(__name__)

_METHOD = "dpo"
_REFERENCE_DIRECTORY = ".pairtrace-reference"
# Padded tokens of a forward pass of the reference.
_REFERENCE_TOKENS = {"cpu": 4096, "cuda": 32_768}
# From this size on, activations are computed twice unless the caller says otherwise.
_LARGE_MODEL = 1_000_000_000
# Twenty entries of the log or more, every tenth step at the least.
_LOG_ENTRIES, _LOG_EVERY = 20, 10
# What is kept of the trainer's log: its other figures are not measured on every device.
_LOGGED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "rewards/", "logps/")
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


def run_dpo(job: Job, directory: RunDirectory, progress: Progress) -> Outcome:
    """Train, and write the result to the `final` directory of the run.

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
        run = _Run(job, rows, model, progress)
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
    log = [
        {name: value for name, value in entry.items() if name.startswith(_LOGGED)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
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
        **_losses(log, trainer.state.global_step),
    }
    return Outcome(figures=figures, dropped=rows.dropped_records(), log=log)


def _read_rows(job: Job, progress: Progress) -> TrainingRows:
    rows = read_rows(job.source, job.renderer, progress)
    if rows.dropped:
        shown = "; ".join(f"row {row.row}: {row.reason}" for row in rows.dropped[:_DROPPED_SHOWN])
        more = "; ..." if len(rows.dropped) > _DROPPED_SHOWN else ""
        counted = f"{len(rows.dropped):,} of {job.source.rows:,} rows cannot be trained on"
        logger.warning("%s: %s%s", counted, shown, more)
    return rows


def _losses(log: list[dict[str, Any]], steps: int) -> dict[str, float | None]:
    """First loss, and means over the entries of the last tenth of the steps, the last entry in any case."""
    late = [entry for entry in log if entry["step"] > 0.9 * steps] or log[-1:]

    def mean(name: str) -> float | None:
        values = [float(entry[name]) for entry in late if name in entry]
        return sum(values) / len(values) if values else None

    first = float(log[0]["loss"]) if log else None
    return {"first_loss": first, "last_loss": mean("loss"), "last_accuracy": mean("rewards/accuracies")}


class _Run:
    """Brings the parts of a run together; what the trainer calls back for stands here.

    Attributes:
        meter: of the current stage.
        computed: sequences whose reference was computed.
        steps: optimizer steps of the whole run.
        monitor: watches the run; None where nothing is to be watched.
    """

    def __init__(self, job: Job, rows: TrainingRows, model: Any, progress: Progress) -> None:
        self.meter: CostMeter
        self.computed = 0
        self._job = job
        self._rows = rows
        self._progress = progress
        self.monitor = _monitor(job)
        config = job.config
        chosen = config.gradient_checkpointing
        large = job.device.type == "cuda" and model.num_parameters() >= _LARGE_MODEL
        self._checkpointing = large if chosen is None else chosen
        adapter = config.lora is not None
        self._operations = Operations(model.config, rows, adapter=adapter, checkpointing=self._checkpointing)
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
                peft_config=_adapter(config),
                processing_class=self._job.renderer.tokenizer,
                callbacks=[callback, *([] if self.monitor is None else [self.monitor])],
            )
        except PairtraceError:
            raise
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"TRL or peft refuses these settings: {error}") from error
        return callback.trainer

    def _arguments(self, output: Path) -> DPOConfig:
        config = self._job.config
        on_cpu = self._job.device.type == "cpu"
        if not on_cpu:
            torch.cuda.set_device(self._job.device)
        arguments = DPOConfig(
            output_dir=str(output),
            beta=config.beta,
            loss_type=list(config.loss_type),
            loss_weights=list(config.loss_weights) or None,
            label_smoothing=config.label_smoothing,
            max_length=None,  # cut already
            precompute_ref_log_probs=True,
            learning_rate=config.rate,
            lr_scheduler_type=SCHEDULERS[config.scheduler],
            warmup_steps=config.warmup,
            optim="adamw_torch_fused",
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_epsilon=config.adam_epsilon,
            max_grad_norm=config.max_grad_norm,
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            per_device_train_batch_size=config.batch_size // config.accumulation,
            gradient_accumulation_steps=config.accumulation,
            gradient_checkpointing=self._checkpointing,
            seed=config.seed,
            bf16=self._job.bfloat16,
            use_cpu=on_cpu,
            save_strategy="steps" if 0 < config.save_steps < self.steps else "no",
            save_steps=max(config.save_steps, 1),
            logging_steps=max(1, min(_LOG_EVERY, self.steps // _LOG_ENTRIES)),
            logging_first_step=True,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        if not on_cpu:
            # Several visible GPUs would be wrapped in DataParallel, which TRL refuses; the run uses one.
            arguments._n_gpu = 1
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


def _monitor(job: Job) -> MonitorCallback | None:
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


def _adapter(config: TrainConfig) -> LoraConfig | None:
    if config.lora is None:
        return None
    return LoraConfig(
        r=config.lora,
        lora_alpha=config.lora_alpha or 2 * config.lora,
        # All linear layers but the LM head, which TRL reads past its adapter.
        target_modules=list(config.lora_targets) or "all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
