"""The settings of the monitor."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pairtrace.errors import ConfigError

_DEFAULT_SAMPLED = 0.7
# They say where things lie or what follows from an alert: a log may go on with other ones. What lies there counts on
# its own, by fingerprints.
_CARRIED_OUT = frozenset(
    ("base", "prompts", "out", "known", "cache", "batch_size", "device", "token_budget", "on_alert", "rules")
    + ("chat_template", "run", "follow", "until_step", "poll_seconds", "patience")
)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What a monitor does at every step that it is shown.

    Attributes:
        base: M0, the checkpoint that training started from: a directory or a hub id.
        prompts: prompt file (yaml or jsonl), hundreds of prompts; one with a distractor is asked without and with it.
        out: directory of the log, the plot, the rollouts and the directions of new clusters.
        known: directory that `pairtrace discover prompts` wrote: clusters to assign changed answers to.
        layer: residual layer; None for that of `known`, or the last one.
        rules: rule file of a judge, or "refusal" for the refusal patterns that come along; None for no judge.
        temperature: of the sampling; 0 takes the most likely token.
        null_samples: further answers of M0 to every prompt: how far answers differ when nothing was trained.
        null_temperature: their temperature; None for `temperature`, and for 0.7 where that is 0.
        max_new_tokens: longest response, in tokens.
        batch_size: responses per forward pass; it does not change what is sampled.
        min_cluster_size: prompts that make a new cluster; None for 2 % of the bag, and at least 5.
        alpha: chance, by the approximation of Wilson's intervals, of an alert anywhere in a run whose answers vary as
            M0's own do.
        min_growth: share of the bag by which a cluster must have grown over M0 to raise an alert. Where a judge's
            verdicts turned true beyond chance, growth beyond chance is enough.
        seed: of the sampling and the clustering.
        on_alert: "log", or "stop" to end training.
        cache: directory of M0's answers, which monitors may share; None for `m0` in `out`.
        device, dtype: of the forward passes; dtype "auto" is M0's own. A training run has its own device and dtype.
        max_length: longest sequence in tokens when responses are read, 0 for no limit.
        truncation: "keep_start" or "keep_end".
        token_budget: tokens per forward pass when responses are read; None for the device's default.
        chat_template: file with a Jinja chat template that replaces the tokenizer's own.
        template_date: day (YYYY-MM-DD) for a chat template that prints the date: the day of training.
    """

    base: str
    prompts: str
    out: str
    known: str | None = None
    layer: int | None = None
    rules: str | None = None
    temperature: float = 0.0
    null_samples: int = 4
    null_temperature: float | None = None
    max_new_tokens: int = 128
    batch_size: int = 64
    min_cluster_size: int | None = None
    alpha: float = 0.01
    min_growth: float = 0.05
    seed: int = 0
    on_alert: Literal["log", "stop"] = "log"
    cache: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_length: int = 1024
    truncation: str = "keep_start"
    token_budget: int | None = None
    chat_template: str | None = None
    template_date: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "null_samples"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("min_cluster_size", self.min_cluster_size is None or self.min_cluster_size >= 3, "at least 3")
        self._check("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a positive number")
        if self.null_temperature is not None:
            self._check("null_temperature", 0 < self.null_temperature < math.inf, "a positive number")
        self._check("alpha", 0 < self.alpha < 1, "a number between 0 and 1, such as 0.01")
        self._check("min_growth", 0 <= self.min_growth < 1, "a share from 0 to below 1")
        self._check("max_length", self.max_length >= 0, "a positive number, or 0 for no limit")
        self._check("on_alert", self.on_alert in ("log", "stop"), "log or stop")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}; expected {expected}")

    @property
    def resampling_temperature(self) -> float:
        """Temperature of M0's further answers."""
        return self.null_temperature or self.temperature or _DEFAULT_SAMPLED

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a log says, as plain JSON values; the inputs' fingerprints come on top."""
        settings = {name: value for name, value in asdict(self).items() if name not in _CARRIED_OUT}
        settings["null_temperature"] = self.resampling_temperature
        return settings


@dataclass(frozen=True, kw_only=True)
class MonitorRunConfig(MonitorConfig):
    """What `monitor_run` does with the checkpoints of a run.

    Attributes:
        run: directory with one directory per checkpoint, whose name ends in the step: `checkpoint-100`.
        follow: wait for checkpoints that are still to come.
        until_step: end after this step; None for no end.
        poll_seconds: time between two looks at the directory. A checkpoint is read when it looked the same twice.
        patience: end when no checkpoint has come for so many seconds; None waits until the directory is removed, as
            `pairtrace train` does at its end, or until interrupted.
    """

    run: str
    follow: bool = False
    until_step: int | None = None
    poll_seconds: float = 5.0
    patience: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("poll_seconds", 0 < self.poll_seconds < math.inf, "a positive number")
        self._check("patience", self.patience is None or self.patience > 0, "a positive number")
