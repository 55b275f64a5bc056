"""The settings of the evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pairtrace.engine.evaluation.rates import Resampling
from pairtrace.engine.prompts import DISTRACTOR, PLAIN
from pairtrace.engine.vllm.options import VLLMOptions, check_backend
from pairtrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `evaluate` does.

    Attributes:
        prompts: prompt file; see `engine.evaluation.requests` for the keys that it may have.
        models: checkpoints to compare, the first one being what the others are compared with. With `rollouts`, names in
            the file; empty for all of them.
        out: report to write (.json). Beside it go `{stem}.responses.parquet`, the costs and, in `{stem}.parts`, what an
            interrupted run goes on with. None keeps nothing. A report that is there may be added to (models, `base`,
            `data`, tasks, samples), and is not overwritten by one of other settings.
        base: M0: drift and implicit rewards are measured against it.
        data: held-out preference pairs.
        rollouts: responses that exist already (.parquet, .jsonl, .jsonl.gz): columns `model`, `prompt_id`, `response`,
            optionally `condition`, `sample`, `finished`.
        label_column: column of `rollouts` that holds the verdicts on the behaviour.
        rules: rule file of the behaviour's judge; None or "refusal" for the refusal rules, so that the behaviour is
            complying.
        refusal_rules: rule file that tells refusals on benign prompts; None or "refusal" for those that come along.
        conditions: put every prompt under these conditions where it has them; None follows the file.
        temperature: of sampling; 0 takes the most likely token.
        samples: responses per request.
        max_new_tokens: longest response, in tokens.
        batch_size: responses per forward pass; it does not change what is sampled.
        seed: of the sampling and of the bootstrap.
        confidence: level of all intervals.
        replicates: of the bootstrap.
        drift: measure the KL divergence from `base`, when there is one.
        device, dtype: of the forward passes; dtype "auto" is each checkpoint's own.
        max_length: longest preference sequence in tokens, as in training; 0 for no limit.
        truncation: "keep_start" or "keep_end", as in training.
        token_budget: tokens per forward pass of drift and preferences.
        format, split: of `data`, where they are not plain.
        chat_template: file with a Jinja chat template that replaces the tokenizers' own.
        template_date: day (YYYY-MM-DD) for a chat template that prints the date: the day of training.
        lm_eval: capability tasks for the package lm-eval.
        lm_eval_limit: examples per task; None for all.
        backend: what answers: "hf" (transformers) or "vllm", with which a model may also be a LoRA adapter. Drift,
            preferences and capabilities are measured with transformers.
        vllm: how vLLM is run; None for its defaults.
    """

    prompts: str
    models: tuple[str, ...] = ()
    out: str | None = None
    base: str | None = None
    data: str | None = None
    rollouts: str | None = None
    label_column: str | None = None
    rules: str | None = None
    refusal_rules: str | None = None
    conditions: tuple[str, ...] | None = None
    temperature: float = 0.0
    samples: int = 1
    max_new_tokens: int = 256
    batch_size: int = 64
    seed: int = 0
    confidence: float = 0.95
    replicates: int = 2000
    drift: bool = True
    device: str = "auto"
    dtype: str = "auto"
    max_length: int = 1024
    truncation: str = "keep_start"
    token_budget: int = 4096
    format: str | None = None
    split: str | None = None
    chat_template: str | None = None
    template_date: str | None = None
    lm_eval: tuple[str, ...] = ()
    lm_eval_limit: int | None = None
    backend: str = "hf"
    vllm: VLLMOptions | None = None

    def __post_init__(self) -> None:
        check_backend(self.backend, self.vllm)
        for name in ("samples", "max_new_tokens", "batch_size", "token_budget", "replicates", "lm_eval_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; expected 0 or more")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"--confidence is {self.confidence}; expected a number between 0 and 1, such as 0.95")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature is {self.temperature}; expected 0 (greedy) or a positive number")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"--temperature 0 gives the same response each time, but {self.samples} were asked for; "
                "set --samples to 1 or raise the temperature"
            )
        if self.max_length < 0:
            raise ConfigError(f"--max-length is {self.max_length}; expected a positive number, or 0 for no limit")
        if self.conditions is not None and not {PLAIN, DISTRACTOR} >= set(self.conditions) > set():
            raise ConfigError(f"--conditions is {','.join(self.conditions)!r}; expected plain, distractor or both")
        if self.out is not None and not self.out.endswith(".json"):
            raise ConfigError(f"--out is {self.out!r}; reports end in .json")
        self._require_models()

    def _require_models(self) -> None:
        twice = sorted({model for model in self.models if self.models.count(model) > 1})
        if twice:
            raise ConfigError(f"the model {twice[0]} is given twice; name each model once")
        if self.rollouts is None:
            if not self.models:
                raise ConfigError("no model was given; name at least one checkpoint, or responses with --rollouts")
            if self.label_column is not None:
                raise ConfigError("--label-column names a column of existing responses, but --rollouts was not given")
        elif not self.models and (self.base is not None or self.data is not None or self.lm_eval):
            raise ConfigError(
                "--base, --data and --lm-eval need checkpoints: give those that wrote --rollouts as MODEL, under the "
                "names that the file has"
            )
        if self.label_column is not None and self.rules is not None:
            raise ConfigError("give either --label-column or --rules: a verdict has one judge")

    @property
    def resampling(self) -> Resampling:
        """How intervals are made."""
        return Resampling(confidence=self.confidence, replicates=self.replicates, seed=self.seed)

    @property
    def needs_checkpoints(self) -> bool:
        """Whether the models are more than names in a file of responses."""
        return self.rollouts is None or self.data is not None or self.base is not None or bool(self.lm_eval)

    def beside(self, suffix: str) -> Path | None:
        """A path beside `out`, or None."""
        return None if self.out is None else Path(self.out).with_suffix(suffix)
