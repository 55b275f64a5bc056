"""The settings of the gradient baseline."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pairtrace.engine.baselines.gradient_projection import NONZEROS
from pairtrace.errors import ConfigError

# What decides a row's gradient; a work directory made with other values is refused.
_GRADIENT_FIELDS = (
    "procedure", "preconditioner", "projection", "checkpoints", "beta", "length_normalized", "lora_rank", "lora_alpha",
    "warmup_share", "learning_rate", "batch_pairs", "seed", "shard_rows",
)  # fmt: skip

_CHOICES = {
    "procedure": ("batched", "published"),
    "score": ("cosine", "tracin"),
    "preconditioner": ("adam", "none"),
    "target_mean": ("directions", "gradients"),
}


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """What `gradient_baseline` does.

    Attributes:
        store: activation store that names data, checkpoint, tokenizer, template and truncation.
        out: scores file to write (.parquet).
        target: preference data whose chosen sides show the behaviour and whose rejected sides do not.
        rollouts: instead of `target`: rollouts of `pairtrace behavior`; a response of M1 that shows the behaviour is
            chosen, a safe one of M0 rejected.
        label_column: column of `rollouts` with the verdicts.
        max_base_rate: see `filter_scenarios`.
        target_mean: "directions" (each target gradient is divided by its norm first, so that scores at a checkpoint are
            in proportion to the mean cosine with the target pairs, as in the code of LESS) or "gradients" (their plain
            mean, as in its text, and for TracIn); None is "directions" for cosine and "gradients" for TracIn.
        target_limit: at most this many target pairs, drawn by `seed`; None for all.
        name: of the behaviour in the scores file.
        work: directory of checkpoints and gradients, which another target can reuse; None for `{out stem}.gradients`
            beside `out`.
        data: where the data is now; None for the place that the store recorded. The same goes for `base`, the
            checkpoint M0, and `chat_template`.
        procedure: "batched" (per-pair gradients out of one backward pass per batch, reference log-probabilities
            computed once) or "published" (one pair at a time, the reference anew for each pair and checkpoint).
        score: "cosine" (LESS) or "tracin" (unprojected dot products of plain gradients).
        checkpoints: of the warm-up, one after each epoch.
        preconditioner: "adam" or "none" for the training pairs; None is "adam" for cosine and "none" for TracIn.
        projection: dimensions of the random projection; 0 for none; None is 8,192 for cosine and 0 for TracIn.
        beta: of the DPO loss.
        length_normalized: log-probabilities per response token instead of their sum.
        lora_rank, lora_alpha: of the adapter, on every linear layer but the LM head (and fused experts).
        warmup_share: share of the usable pairs that the warm-up trains on.
        learning_rate: peak of the warm-up.
        batch_pairs: pairs per step of the warm-up.
        seed: of adapter, warm-up, projection and choice of target pairs.
        device: "auto", "cpu", "cuda" or "cuda:N".
        compute_dtype: of the base model; "auto" is that of the store. The adapter is float32.
        token_budget: padded tokens per batch; None for the device's default.
        shard_rows: rows whose gradients are kept together, the unit of resumption.
    """

    store: str
    out: str
    target: str | None = None
    rollouts: str | None = None
    label_column: str | None = None
    max_base_rate: float = 0.0
    target_mean: Literal["directions", "gradients"] | None = None
    target_limit: int | None = None
    name: str = "gradient"
    work: str | None = None
    data: str | None = None
    base: str | None = None
    chat_template: str | None = None
    procedure: Literal["batched", "published"] = "batched"
    score: Literal["cosine", "tracin"] = "cosine"
    checkpoints: int = 4
    preconditioner: Literal["adam", "none"] | None = None
    projection: int | None = None
    beta: float = 0.1
    length_normalized: bool = False
    lora_rank: int = 8
    lora_alpha: float = 16.0
    warmup_share: float = 0.05
    learning_rate: float = 1e-4
    batch_pairs: int = 32
    seed: int = 0
    device: str = "auto"
    compute_dtype: str = "auto"
    token_budget: int | None = None
    shard_rows: int = 512

    def __post_init__(self) -> None:
        tracin = self.score == "tracin"
        if self.preconditioner is None:
            object.__setattr__(self, "preconditioner", "none" if tracin else "adam")
        if self.target_mean is None:
            object.__setattr__(self, "target_mean", "gradients" if tracin else "directions")
        if self.projection is None:
            object.__setattr__(self, "projection", 0 if tracin else 8192)
        if (self.target is None) == (self.rollouts is None):
            raise ConfigError("expected exactly one of --target (preference pairs) and --rollouts (of a behaviour)")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} is {getattr(self, name)!r}; expected {' or '.join(allowed)}")
        if tracin and (self.projection, self.preconditioner, self.target_mean) != (0, "none", "gradients"):
            raise ConfigError(
                "--score tracin is the unprojected dot product of plain gradients; leave out --projection, "
                "--preconditioner and --target-mean"
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        assert self.projection is not None
        if self.projection < 0 or self.projection % NONZEROS:
            raise ConfigError(f"--projection is {self.projection}; expected a multiple of {NONZEROS}, or 0 for none")
        for name in ("checkpoints", "lora_rank", "batch_pairs", "shard_rows", "target_limit", "token_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
        for name in ("beta", "lora_alpha", "learning_rate"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected a positive number")
        if not 0 < self.warmup_share <= 1:
            raise ConfigError(f"--warmup-share is {self.warmup_share}; expected a share above 0, at most 1")
        if not 0 <= self.seed < 1 << 31:
            raise ConfigError(f"--seed is {self.seed}; expected a number from 0 to 2,147,483,647")

    @property
    def work_directory(self) -> Path:
        """Where checkpoints and gradients are kept."""
        out = Path(self.out)
        return out.with_name(f"{out.stem}.gradients") if self.work is None else Path(self.work)

    @property
    def gradient_settings(self) -> dict[str, Any]:
        """The settings that decide the gradients, as plain JSON values."""
        values = asdict(self)
        return {name: values[name] for name in _GRADIENT_FIELDS}
