"""Settings of fine-tuning against probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pairtrace.engine.finetuning.examples import ExampleSource, open_examples
from pairtrace.engine.training.config import TrainConfig
from pairtrace.errors import ConfigError

Method = Literal["sft", "dpo"]
Signal = Literal["probe", "classifier", "judge", "none"]

SFT_FULL_RATE, SFT_LORA_RATE = 1e-5, 1e-4

# What a method has no use for; the settings of the other one keep their defaults.
_OF_DPO = frozenset(
    ("beta", "loss_type", "loss_weights", "label_smoothing", "reference_cache", "conditions", "samples")
    + ("temperature", "max_new_tokens", "sample_batch", "min_gap")
    + ("monitor", "monitor_steps", "monitor_rules", "monitor_known", "monitor_stop")
)
_OF_SFT = frozenset(("prompt", "completion", "split", "limit", "probe_weight", "imitate_below", "threshold"))
_OF_PAIRS = ("format", "chosen", "rejected", "source")
# They name what is recorded by its content instead.
_BY_CONTENT = frozenset(("probe", "classifier", "rules", "sample_batch"))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """What `finetune` does, beside how it trains, which `TrainConfig` says.

    Attributes:
        data: given responses for "sft" (see `finetuning.examples`), prompts for "dpo" (a prompt file).
        method: "sft": the loss of the given responses, and the probability of the probe on the model's activations of
            them. "dpo": sampled responses, the one that the signal finds least like the behaviour against the one that
            it finds most like it (arXiv 2510.21531).
        signal: what is trained against. "probe"; the controls "classifier" and "judge", which see the response instead
            of the activations; "none" for no intervention (sft) or pairs drawn at random (dpo).
        probe: probe file. Its training probes are trained against with the signal "probe"; all its other probes, and
            with another signal the training probes as well, are looked at and never have a part in the loss.
        probe_layers: layers of the probes, several of which are an ensemble; None for the best one of the file.
        probe_weight: of the probability in the loss of "sft"; 0 only looks.
        imitate_below: "sft" against a probe imitates only the given responses that the probe gives less than this
            probability, in the mean over several, as the untrained model reads them; the other ones have a part in the
            term alone. None imitates all, as published.
        classifier: directory of a transformers sequence classifier of responses.
        classifier_label: its label that stands for the behaviour; None for the last one.
        rules: rule file of the judge; None or "refusal" for the refusal rules, by which complying is the behaviour.
        threshold: with a control, "sft" leaves out the given responses that the signal gives this probability or
            more: neither a verdict nor the text can be differentiated.
        min_gap: "dpo" leaves out the prompts whose lowest and highest probability differ by no more.
        completion: column of the given responses; None for the usual names.
        conditions: "plain", "distractor" or both, for prompts that have them; None follows the file.
        samples: responses per prompt.
        temperature: of the sampling.
        max_new_tokens: longest sampled response, in tokens.
        sample_batch: responses per forward pass of the sampling; it does not change what is sampled.
    """

    method: Method
    signal: Signal = "probe"
    probe: str | None = None
    probe_layers: tuple[int, ...] | None = None
    probe_weight: float = 1.0
    imitate_below: float | None = None
    classifier: str | None = None
    classifier_label: str | None = None
    rules: str | None = None
    threshold: float = 0.5
    min_gap: float = 0.0
    completion: str | None = None
    conditions: tuple[str, ...] | None = None
    samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 256
    sample_batch: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("method", get_args(Method)), ("signal", get_args(Signal))):
            self._check(name, lambda value, known=known: value in known, f"one of {', '.join(known)}")
        for name in ("max_new_tokens", "sample_batch", "temperature"):
            self._check(name, lambda value: value > 0, "a positive number")
        self._check("samples", lambda value: value >= 2, "at least 2: a pair needs two responses")
        self._check("probe_weight", lambda value: value >= 0, "0 or more")
        self._check("threshold", lambda value: 0 < value <= 1, "a probability above 0")
        self._check("imitate_below", lambda value: 0 < value <= 1, "a probability above 0")
        self._check("min_gap", lambda value: 0 <= value < 1, "a number from 0 to below 1")
        self._require_signal()
        foreign = sorted(_OF_DPO if self.method == "sft" else _OF_SFT)
        for name in (*foreign, *_OF_PAIRS):
            default = getattr(type(self), name)
            if getattr(self, name) != default:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} has no part in --method {self.method}; leave it out")

    def _require_signal(self) -> None:
        if self.signal == "probe" and self.probe is None:
            raise ConfigError("no probe was given; name a probe file with --probe, or a control with --signal")
        if self.probe is None and self.probe_layers is not None:
            raise ConfigError("--probe-layers chooses among the probes of a file; give --probe")
        for name, signal in (
            *(("classifier", "classifier"), ("classifier_label", "classifier")),
            *(("rules", "judge"), ("imitate_below", "probe")),
        ):
            if getattr(self, name) is not None and self.signal != signal:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} belongs to --signal {signal}, but the signal is {self.signal}")
        if self.signal == "classifier" and self.classifier is None:
            raise ConfigError("no classifier was given; name its directory with --classifier")

    @property
    def rate(self) -> float:
        """Peak learning rate, with the default that suits method and what is trained."""
        if self.method == "dpo" or self.learning_rate is not None:
            return super().rate
        return SFT_FULL_RATE if self.lora is None else SFT_LORA_RATE

    def open_responses(self) -> ExampleSource:
        """Open the given responses.

        Raises:
            DataError: they cannot be read.
        """
        return open_examples(
            self.data, prompt=self.prompt, completion=self.completion, split=self.split, limit=self.limit
        )

    def identity(self) -> dict[str, Any]:
        """The settings that decide the trained weights, as plain JSON values; files are named by their content."""
        foreign = (_OF_DPO if self.method == "sft" else _OF_SFT) | set(_OF_PAIRS) | _BY_CONTENT
        return {name: value for name, value in super().identity().items() if name not in foreign}

    def train_config(self, data: str) -> TrainConfig:
        """The settings of a preference training with these ones.

        Args:
            data: the pairs.
        """
        own = {name: getattr(self, name) for name in TrainConfig.__dataclass_fields__}
        return TrainConfig(**{**own, "data": data})
