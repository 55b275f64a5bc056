"""Settings of preference training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pairtrace.engine.data_config import PairsConfig
from pairtrace.errors import ConfigError

# Names as users know them, and as transformers does.
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
DTYPES = ("auto", "float32", "bfloat16")
# Of TRL 1.16's DPO trainer.
LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
FULL_RATE, LORA_RATE = 5e-7, 1e-5

# They change how a run is carried out, not what it computes (up to rounding): a run may go on with other ones.
_CARRIED_OUT = frozenset(
    ("out", "model", "data", "chat_template", "reference_cache", "device", "threads", "save_steps", "merge")
    + ("gradient_checkpointing", "save_dtype")
    + ("monitor", "monitor_steps", "monitor_rules", "monitor_known", "monitor_stop")
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PairsConfig):
    """What `train` does, beside what `PairsConfig` says about the pairs.

    Attributes:
        out: directory of the trained checkpoint (M1). It appears when training is complete.
        lora: rank of the adapter; None trains all weights.
        lora_alpha: scale of the adapter; None for twice the rank.
        lora_targets: modules that get an adapter; empty for all linear layers but the LM head.
        merge: write the model with the adapter merged in, and the adapter beside it; else the adapter alone.
        learning_rate: peak; None for 5e-7 (all weights) or 1e-5 (adapter).
        beta: strength of the pull towards M0 (arXiv 2305.18290, eq. 7).
        loss_type: losses of TRL's DPO trainer, such as "sigmoid" or "ipo"; several are added.
        loss_weights: their weights; empty for 1 each.
        label_smoothing: of the losses "robust" and "exo_pair".
        epochs: passes over the pairs.
        max_steps: optimizer steps, instead of `epochs`.
        batch_size: pairs per optimizer step.
        accumulation: forward passes that a step's pairs are spread over, to save memory.
        warmup: share of the steps in which the rate rises from 0.
        scheduler: "linear", "cosine" or "constant" after that.
        weight_decay, adam_beta1, adam_beta2, adam_epsilon: of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 for never.
        group_by_length: batches of pairs of similar length, which need less padding; their order is random.
        seed: of the order of the pairs and of the adapter's first weights.
        data_seed: of the order, where it shall differ.
        compute_dtype: "auto" (bfloat16 on a GPU that has it, float32 on a CPU), "float32" or "bfloat16". Without an
            adapter the weights that are trained are float32 in any case: updates of DPO's size vanish in bfloat16.
        save_dtype: dtype of the written weights; "auto" is M0's own.
        device: "auto", "cpu", "cuda" or "cuda:N".
        gradient_checkpointing: compute activations twice to save memory; None for models of a billion weights on.
        threads: PyTorch's threads; None leaves the process's setting alone.
        save_steps: a checkpoint to resume from every so many steps; 0 for never.
        reference_cache: directory of M0's log-probabilities, shared between runs; None for `.pairtrace-reference`
            beside `out`.
        monitor: prompt file to ask every few steps, to see what training changes; None for no monitor. Its log goes to
            `{out}.monitor`, and the weights are the same with it and without.
        monitor_steps: steps between two looks.
        monitor_rules, monitor_known: `rules` and `known` of `MonitorConfig`.
        monitor_stop: end training at an alert.
    """

    out: str
    lora: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()
    merge: bool = True
    learning_rate: float | None = None
    beta: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 32
    accumulation: int = 1
    warmup: float = 0.1
    scheduler: str = "linear"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    group_by_length: bool = False
    seed: int = 0
    data_seed: int | None = None
    compute_dtype: str = "auto"
    save_dtype: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool | None = None
    threads: int | None = None
    save_steps: int = 500
    reference_cache: str | None = None
    monitor: str | None = None
    monitor_steps: int = 50
    monitor_rules: str | None = None
    monitor_known: str | None = None
    monitor_stop: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lora", "lora_alpha", "learning_rate", "beta", "epochs", "max_steps", "batch_size"):
            self._check(name, lambda value: value > 0, "a positive number")
        for name in ("accumulation", "adam_epsilon", "threads", "monitor_steps"):
            self._check(name, lambda value: value > 0, "a positive number")
        for name in ("weight_decay", "max_grad_norm", "save_steps", "label_smoothing"):
            self._check(name, lambda value: value >= 0, "0 or more")
        for name in ("warmup", "adam_beta1", "adam_beta2"):
            self._check(name, lambda value: 0 <= value < 1, "a number from 0 to below 1")
        for name in ("seed", "data_seed"):
            self._check(name, lambda value: 0 <= value < 2**32, "a whole number from 0 to below 2**32")
        for name, known in (("scheduler", tuple(SCHEDULERS)), ("compute_dtype", DTYPES), ("save_dtype", DTYPES)):
            self._check(name, lambda value, known=known: value in known, f"one of {', '.join(known)}")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"--batch-size is {self.batch_size}, the pairs of one step, and cannot be spread evenly over "
                f"{self.accumulation} forward passes; give a divisor of it as --accumulation"
            )
        unknown = sorted(set(self.loss_type) - set(LOSSES))
        if unknown or not self.loss_type:
            found = f"unknown loss {unknown[0]!r}" if unknown else "no loss was given"
            raise ConfigError(f"{found}; expected at least one of {', '.join(LOSSES)}")
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            raise ConfigError(
                f"--loss-weight was given {len(self.loss_weights)} times for {len(self.loss_type)} losses; "
                "give one each"
            )
        if self.monitor is None and (self.monitor_rules or self.monitor_known or self.monitor_stop):
            raise ConfigError(
                "--monitor-rules, --monitor-known and --monitor-stop belong to a monitor; give --monitor PROMPTS"
            )
        if self.lora is None and (self.lora_alpha is not None or self.lora_targets or not self.merge):
            raise ConfigError("--lora-alpha, --lora-target and --no-merge belong to an adapter; give --lora RANK")

    def _check(self, name: str, good: Any, expected: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if (isinstance(value, float) and not math.isfinite(value)) or not good(value):
            raise ConfigError(f"--{name.replace('_', '-')} is {value!r}; expected {expected}")

    @property
    def rate(self) -> float:
        """Peak learning rate, with the default that suits what is trained."""
        if self.learning_rate is not None:
            return self.learning_rate
        return FULL_RATE if self.lora is None else LORA_RATE

    def identity(self) -> dict[str, Any]:
        """The settings that decide the trained weights, as plain JSON values."""
        settings = {name: value for name, value in asdict(self).items() if name not in _CARRIED_OUT}
        settings["learning_rate"] = self.rate
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
