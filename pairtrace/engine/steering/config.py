"""The settings of steering."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.errors import ConfigError

Positions = Literal["all", "generated", "prompt_end"]
AblateLayers = Literal["own", "all"]
AblateTo = Literal["zero", "base"]
DEFAULT_SCALES = (0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """What `steer` does.

    Attributes:
        prompts: prompt file, as for `evaluate`: an entry may have `cell`, `benign`, `constraint`.
        model: checkpoint that answers. It may be another one than the direction was made from, of the same width and
            tokenizer: a vector of M0 is projected out of M1.
        directions: direction or probe file.
        out: report to write (.json); beside it go `{stem}.responses.parquet`, the costs and, in `{stem}.parts`, what
            an interrupted run goes on with.
        behavior: which vector of the file; None for the only one (of a probe file: the only one that is neither
            held out nor a baseline). Banks cannot be steered along: the maximum over several has no direction.
        layers: residual layers to steer at, one at a time; None for those of the file.
        scales: what is added, in units of the mean norm of the residual stream at the layer, over the tokens that the
            unsteered model generates: 0.5 adds a vector half as long as a state. A negative scale pushes away.
        ablate: project the direction out as well: `h - (h @ u) u` with the unit vector u.
        ablate_layers: "own": at the direction's own layer, after which the later blocks may write it again; "all": at
            every layer, from the embedding output to the last one, and between the attention and the MLP of every
            block, so that nothing ever reads it (Arditi et al., arXiv 2406.11717, section 2.4).
        ablate_to: what is left of the direction where it is projected out: "zero", or "base": its mean component in the
            base model at the end of the prompts, which a file of `pairtrace shift` holds (also called affine: arXiv
            2411.09003). Where M0's states themselves lie far along the direction, zero is not what they were.
        positions: "all": at every token, the prompt included; "generated": at the last token of the prompt, which the
            first generated token is read from, and at every generated one; "prompt_end": at the last token of the
            prompt alone.
        controls: random directions, drawn like white noise, that are added at the same norm, and projected out: what
            any vector would do.
        norm_responses: responses of the unsteered model that the norm is taken from.
        rules, refusal_rules, conditions, temperature, samples, max_new_tokens, batch_size, seed, confidence,
            replicates, device, dtype, token_budget, chat_template, template_date: as for `EvaluateConfig`. The seed
            also draws the random directions.
    """

    prompts: str
    model: str
    directions: str
    out: str
    behavior: str | None = None
    layers: tuple[int, ...] | None = None
    scales: tuple[float, ...] = DEFAULT_SCALES
    ablate: bool = False
    ablate_layers: AblateLayers = "own"
    ablate_to: AblateTo = "zero"
    positions: Positions = "all"
    controls: int = 1
    norm_responses: int = 128
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
    device: str = "auto"
    dtype: str = "auto"
    token_budget: int = 4096
    chat_template: str | None = None
    template_date: str | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(scale) for scale in self.scales) or len(set(self.scales)) < len(self.scales):
            raise ConfigError(f"--scales is {self.scales}; expected distinct numbers, such as 0.25,0.5")
        if not self.scales and not self.ablate:
            raise ConfigError("nothing to do: give --scales, --ablate, or both")
        if self.ablate_layers not in ("own", "all"):
            raise ConfigError(f"--ablate-layers is {self.ablate_layers!r}; expected own or all")
        if self.ablate_layers == "all" and not self.ablate:
            raise ConfigError("--ablate-layers all says where to project out; give --ablate as well")
        if self.ablate_to not in ("zero", "base"):
            raise ConfigError(f"--ablate-to is {self.ablate_to!r}; expected zero or base")
        if self.ablate_to == "base" and not self.ablate:
            raise ConfigError("--ablate-to base says what is left of the direction; give --ablate as well")
        if self.ablate_to == "base" and self.ablate_layers == "all":
            raise ConfigError("--ablate-to base is known for the direction's own layer; leave --ablate-layers out")
        if self.positions not in ("all", "generated", "prompt_end"):
            raise ConfigError(f"--positions is {self.positions!r}; expected all, generated or prompt_end")
        if self.layers is not None and not self.layers:
            raise ConfigError("--layers names no layer; expected at least one, or leave it out for those of the file")
        if self.controls < 0:
            raise ConfigError(f"--controls is {self.controls}; expected 0 or more")
        if self.norm_responses < 1:
            raise ConfigError(f"--norm-responses is {self.norm_responses}; expected at least 1")
        # What answering has to say about its settings is said here.
        assert self.answering

    @property
    def answering(self) -> EvaluateConfig:
        """How the model answers and is judged.

        Raises:
            ConfigError: a setting is out of range.
        """
        return EvaluateConfig(
            prompts=self.prompts,
            models=(self.model,),
            out=self.out,
            rules=self.rules,
            refusal_rules=self.refusal_rules,
            conditions=self.conditions,
            temperature=self.temperature,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=self.seed,
            confidence=self.confidence,
            replicates=self.replicates,
            device=self.device,
            dtype=self.dtype,
            token_budget=self.token_budget,
            chat_template=self.chat_template,
            template_date=self.template_date,
        )

    def beside(self, suffix: str) -> Path:
        """A path beside `out`."""
        return Path(self.out).with_suffix(suffix)
