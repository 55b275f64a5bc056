"""The settings of the behaviour stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pairtrace.engine.directions import direction_name
from pairtrace.engine.rollouts import RolloutConfig
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.errors import ConfigError

Kinds = Literal["mean", "bank", "both"]


@dataclass(frozen=True, kw_only=True)
class BehaviorConfig:
    """What `build_behavior` does.

    Attributes:
        out: direction file to write (.safetensors); the rollouts are kept beside it as `{stem}.rollouts.parquet`.
        base: M0, the checkpoint from before preference training: a directory or a hub id.
        tuned: M1, the checkpoint after it, with the back end vllm also a LoRA adapter of `base`; not needed with
            `rollouts`.
        prompts: prompt file; not needed with `rollouts` that carry their prompts.
        name: of the behaviour; None takes the stem of `out`. A bank is called `{name}-bank`.
        rollouts: existing rollouts to start from instead of sampling.
        label_column: column of `rollouts` with the verdicts.
        rules: rule file of the judge, or "refusal" for the refusal rules; None for those (or the verdicts that
            `rollouts` brings).
        kinds: "mean" (mean over all rollout pairs), "bank" (one mean per scenario), or "both".
        layers: residual layers; None takes those of `store`, or all from 1 on.
        store: activation store that the directions are meant for: its layers, max_length, truncation and compute
            dtype are used, its model, tokenizer and template must be the same, and options may not contradict it.
        max_base_rate: see `filter_scenarios`.
        temperature, samples, max_new_tokens, batch_size, seed: see `RolloutConfig`.
        device, dtype: of the forward passes; dtype "auto" is the checkpoint's own, and for reading that of `store`.
        max_length: longest sequence in tokens when responses are read, 0 for no limit; None takes that of `store`,
            or 1024.
        truncation: "keep_start" or "keep_end"; None takes that of `store`, or "keep_start".
        token_budget: as for extraction.
        chat_template: file with a Jinja chat template that replaces the tokenizers' own.
        template_date: day (YYYY-MM-DD) for a chat template that prints the date: the day of training.
        backend: what samples: "hf" (transformers) or "vllm". Responses are read by transformers in any case.
        vllm: how vLLM is run; None for its defaults.
    """

    out: str
    base: str
    tuned: str | None = None
    prompts: str | None = None
    name: str | None = None
    rollouts: str | None = None
    label_column: str | None = None
    rules: str | None = None
    kinds: Kinds = "both"
    layers: tuple[int, ...] | None = None
    store: str | None = None
    max_base_rate: float = 0.0
    temperature: float = 0.7
    samples: int = 8
    max_new_tokens: int = 256
    batch_size: int = 32
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    max_length: int | None = None
    truncation: str | None = None
    token_budget: int | None = None
    chat_template: str | None = None
    template_date: str | None = None
    backend: str = "hf"
    vllm: VLLMOptions | None = None

    def __post_init__(self) -> None:
        if not self.out.endswith(".safetensors"):
            raise ConfigError(f"--out is {self.out!r}; direction files end in .safetensors")
        if self.kinds not in ("mean", "bank", "both"):
            raise ConfigError(f"--kind is {self.kinds!r}; expected mean, bank or both")
        if not 0 <= self.max_base_rate <= 1:
            raise ConfigError(f"--max-base-rate is {self.max_base_rate}; expected a share from 0 to 1")
        if self.layers is not None and not self.layers:
            raise ConfigError("--layers names no layer; expected at least one, or leave it out for the default")
        if self.max_length is not None and self.max_length < 0:
            raise ConfigError(f"--max-length is {self.max_length}; expected a positive number, or 0 for no limit")
        if self.token_budget is not None and self.token_budget < 1:
            raise ConfigError(f"--token-budget is {self.token_budget}; expected at least 1")
        if self.rollouts is None and (self.prompts is None or self.tuned is None):
            raise ConfigError("sampling needs a prompt file and --tuned; or give existing rollouts with --rollouts")
        if self.rollouts is None and self.label_column is not None:
            raise ConfigError("--label-column names a column of existing rollouts, but --rollouts was not given")
        if self.label_column is not None and self.rules is not None:
            raise ConfigError("give either --label-column or --rules: a verdict has one judge")
        # An unusable name and unusable settings of the sampling are found here, before hours of work.
        assert self.direction_name
        assert self.rollouts is not None or self.rollout_config

    @property
    def direction_name(self) -> str:
        """The behaviour's name.

        Raises:
            DirectionError: it cannot name a behaviour.
        """
        return direction_name(self.name, self.out)

    @property
    def rollout_config(self) -> RolloutConfig:
        """How to sample; only without `rollouts`.

        Raises:
            ConfigError: a setting of the sampling is out of range.
        """
        assert self.prompts is not None and self.tuned is not None
        return RolloutConfig(
            prompts=self.prompts,
            base=self.base,
            tuned=self.tuned,
            out=self.rollouts_out,
            temperature=self.temperature,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
            chat_template=self.chat_template,
            template_date=self.template_date,
            backend=self.backend,
            vllm=self.vllm,
        )

    @property
    def rollouts_out(self) -> str:
        """Where the rollouts and verdicts are kept."""
        return str(Path(self.out).with_suffix(".rollouts.parquet"))
