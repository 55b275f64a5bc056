"""Settings of pairtrace as TRL's trainers and peft take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from pairtrace.engine.training.config import SCHEDULERS, TrainConfig

# From this size on, activations are computed twice unless the caller says otherwise.
_LARGE_MODEL = 1_000_000_000
# Twenty entries of the log or more, every tenth step at the least.
_LOG_ENTRIES, _LOG_EVERY = 20, 10


def trainer_arguments(
    config: TrainConfig, output: Path, *, steps: int, device: torch.device, bfloat16: bool, checkpointing: bool
) -> dict[str, Any]:
    """What the configurations of TRL's trainers have in common.

    Args:
        config: the settings.
        output: directory of the checkpoints.
        steps: optimizer steps of the whole run.
        device: where the model is trained.
        bfloat16: whether forward passes run in bfloat16.
        checkpointing: whether activations are computed twice.
    """
    return {
        "output_dir": str(output),
        "max_length": None,  # cut already
        "learning_rate": config.rate,
        "lr_scheduler_type": SCHEDULERS[config.scheduler],
        "warmup_steps": config.warmup,
        "optim": "adamw_torch_fused",
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "max_grad_norm": config.max_grad_norm,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size // config.accumulation,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_checkpointing": checkpointing,
        "seed": config.seed,
        "bf16": bfloat16,
        "use_cpu": device.type == "cpu",
        "save_strategy": "steps" if 0 < config.save_steps < steps else "no",
        "save_steps": max(config.save_steps, 1),
        "logging_steps": max(1, min(_LOG_EVERY, steps // _LOG_ENTRIES)),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def use_device(device: torch.device, arguments: Any) -> None:
    """Train on one device, whatever others the process sees: several would be wrapped in DataParallel."""
    if device.type != "cpu":
        torch.cuda.set_device(device)
        arguments._n_gpu = 1


def computes_twice(config: TrainConfig, model: Any, device: torch.device) -> bool:
    """Whether activations are computed twice to save memory."""
    if config.gradient_checkpointing is not None:
        return config.gradient_checkpointing
    return device.type == "cuda" and bool(model.num_parameters() >= _LARGE_MODEL)


def adapter_of(config: TrainConfig) -> LoraConfig | None:
    """The adapter to train; None for all weights."""
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
