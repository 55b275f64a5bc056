"""The settings of discovery among prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pairtrace.engine.behavior_config import BehaviorConfig
from pairtrace.engine.discovery.clustering import ClusterConfig
from pairtrace.engine.discovery.description import DescriptionConfig
from pairtrace.engine.discovery.prompt_points import default_size
from pairtrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """What `discover_prompts` does.

    Attributes:
        store: activation store; it decides how answers are read.
        base: M0, the model of the store: a directory or a hub id.
        out: directory to write.
        tuned: M1; not needed with `rollouts`.
        prompts: prompt file; one with a distractor is asked without and with it. Not needed with `rollouts` that carry
            their prompts.
        rollouts: existing rollouts of both models instead of sampling.
        label_column: column of `rollouts` with the verdicts.
        rules: rule file of the judge, or "refusal" for the refusal rules; None for those (or the verdicts that
            `rollouts` brings).
        layer: residual layer; None takes the deepest of the store.
        dimensions: axes of the cosine matrix that are clustered.
        min_cluster_size: prompts that make a cluster; None chooses by their number, see `default_size`.
        min_samples: see `ClusterConfig`. Few neighbours follow a behaviour that comes in several formats; with ten or
            more of them the formats fell apart on an organism, with 4 to 8 they stayed together.
        flag_fdr: largest q-value at which a cluster is flagged.
        description: how clusters are described.
        allow_incomplete: take the finished rows of a store that still misses some.
        scheduler: address of a Dask scheduler; None starts a local cluster.
        temperature, samples, max_new_tokens, batch_size, seed: see `RolloutConfig`. One greedy answer per prompt and
            model is usual here: with several sampled ones a prompt stands for a mixture of what its answers became.
        device, dtype, token_budget, chat_template, template_date: see `BehaviorConfig`.

    Raises:
        ConfigError: a value is out of range.
    """

    store: str
    base: str
    out: str
    tuned: str | None = None
    prompts: str | None = None
    rollouts: str | None = None
    label_column: str | None = None
    rules: str | None = None
    layer: int | None = None
    dimensions: int = 10
    min_cluster_size: int | None = None
    min_samples: int = 5
    flag_fdr: float = 0.05
    description: DescriptionConfig = field(default_factory=DescriptionConfig)
    allow_incomplete: bool = False
    scheduler: str | None = None
    temperature: float = 0.0
    samples: int = 1
    max_new_tokens: int = 256
    batch_size: int = 32
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    token_budget: int | None = None
    chat_template: str | None = None
    template_date: str | None = None

    def __post_init__(self) -> None:
        if self.dimensions < 1:
            raise ConfigError(f"--dimensions is {self.dimensions}; expected at least 1")
        if not 0 < self.flag_fdr < 1:
            raise ConfigError(f"--flag-fdr is {self.flag_fdr}; expected above 0 and below 1")
        # Unusable settings of the clustering, the sampling and the reading are found here, before hours of work.
        assert self.clustering(0)
        assert self.behavior

    @property
    def behavior(self) -> BehaviorConfig:
        """How rollouts are sampled, judged and read, as for a behaviour; they are kept in `out`."""
        return BehaviorConfig(
            out=str(Path(self.out) / "prompts.safetensors"),
            store=self.store,
            layers=None if self.layer is None else (self.layer,),
            **{
                name: getattr(self, name)
                for name in (
                    "base", "tuned", "prompts", "rollouts", "label_column", "rules", "temperature", "samples",
                    "max_new_tokens", "batch_size", "seed", "device", "dtype", "token_budget", "chat_template",
                    "template_date",
                )
            },
        )  # fmt: skip

    def clustering(self, items: int) -> ClusterConfig:
        """How P items are clustered."""
        return ClusterConfig(
            min_cluster_size=default_size(items) if self.min_cluster_size is None else self.min_cluster_size,
            min_samples=self.min_samples,
            seed=self.seed,
        )
