"""What responses are told apart by: a probe, or a control that sees the text alone.

Every signal gives the probability that a response shows the behaviour, and NaN where it has none to give.
Legend: n responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pairtrace.engine.cost import CostMeter
from pairtrace.engine.judge import RuleJudge
from pairtrace.engine.probes.probe_file import Probe
from pairtrace.engine.progress import Progress
from pairtrace.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from pairtrace.engine.finetuning.config import FinetuneConfig
    from pairtrace.engine.probes.rollout_examples import ResponseReader

Conversation = Sequence[dict[str, Any]]


class ResponseSignal(Protocol):
    """Anything that rates responses."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the ratings, beside the model that is trained; plain JSON values."""

    def probabilities(
        self, conversations: Sequence[Conversation], responses: Sequence[str], meter: CostMeter, progress: Progress
    ) -> np.ndarray:
        """Rate the response to each conversation: float64 [n], NaN where there is no rating."""


@dataclass(frozen=True, kw_only=True)
class ProbeSignal:
    """The mean probability of probes on a model's activations of the responses.

    Attributes:
        probes: at least one; they belong to the model.
        digest: of their file.
        reader: of the model, for the layers of the probes.
    """

    probes: tuple[Probe, ...]
    digest: str
    reader: ResponseReader

    @property
    def identity(self) -> dict[str, Any]:
        """As `ResponseSignal.identity`."""
        return {"probe_digest": self.digest, "probes": [f"{probe.name}/{probe.layer}" for probe in self.probes]}

    def probabilities(
        self, conversations: Sequence[Conversation], responses: Sequence[str], meter: CostMeter, progress: Progress
    ) -> np.ndarray:
        """As `ResponseSignal.probabilities`."""
        from pairtrace.engine.probes.judged_responses import JudgedResponse

        rows = [
            JudgedResponse(row=row, prompt=str(row), messages=list(messages), response=response, label=0)
            for row, (messages, response) in enumerate(zip(conversations, responses, strict=True))
        ]
        means, problems = self.reader.read(rows, meter, progress)
        layers = self.reader.layers
        each = [probe.probabilities(means[:, layers.index(probe.layer)]) for probe in self.probes]
        found: np.ndarray = np.mean(each, axis=0)
        found[list(problems)] = np.nan
        return found


@dataclass(frozen=True, kw_only=True)
class JudgeSignal:
    """The verdict of rules, as 1 or 0.

    Attributes:
        judge: who gives it.
    """

    judge: RuleJudge

    @property
    def identity(self) -> dict[str, Any]:
        """As `ResponseSignal.identity`."""
        return {"judge": self.judge.name}

    def probabilities(
        self, conversations: Sequence[Conversation], responses: Sequence[str], meter: CostMeter, progress: Progress
    ) -> np.ndarray:
        """As `ResponseSignal.probabilities`."""
        verdicts = self.judge.verdicts([list(messages) for messages in conversations], responses)
        return np.array([np.nan if verdict is None else float(verdict) for verdict in verdicts])


class ClassifierSignal:
    """The probability of one label of a transformers sequence classifier, which reads the response alone.

    Args:
        directory: of the classifier: safetensors weights, tokenizer.
        label: that stands for the behaviour; None for the last one.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ModelError: it is no classifier, or is damaged.
        ConfigError: it has no such label.
    """

    _BATCH = 32

    def __init__(self, directory: str, label: str | None, device: str) -> None:
        from pairtrace.engine.checkpoint import (
            load_config,
            load_tokenizer,
            model_fingerprint,
            require_whole_weights,
            resolve_checkpoint,
        )

        self._path = resolve_checkpoint(directory)
        require_whole_weights(self._path)
        self._config = load_config(self._path)
        if not any(name.endswith("ForSequenceClassification") for name in self._config.architectures or ()):
            raise ModelError(
                f"{directory} is no sequence classifier but {self._config.architectures}; expected an architecture "
                "of transformers that ends in ForSequenceClassification"
            )
        self._device = device
        self._tokenizer = load_tokenizer(self._path)
        labels = {str(name): int(number) for number, name in self._config.id2label.items()}
        if label is not None and label not in labels:
            raise ConfigError(f"--classifier-label is {label!r}; {directory} knows {', '.join(labels)}")
        self._label = max(labels.values()) if label is None else labels[label]
        if len(labels) < 2:
            raise ModelError(f"{directory} has {len(labels)} label; expected at least two, one being the behaviour")
        self._fingerprint = model_fingerprint(self._path)

    @property
    def identity(self) -> dict[str, Any]:
        """As `ResponseSignal.identity`."""
        return {"classifier_fingerprint": self._fingerprint, "classifier_label": self._label}

    def probabilities(
        self, conversations: Sequence[Conversation], responses: Sequence[str], meter: CostMeter, progress: Progress
    ) -> np.ndarray:
        """As `ResponseSignal.probabilities`; a response longer than the classifier reads is cut."""
        import torch
        from transformers import AutoModelForSequenceClassification

        from pairtrace.engine.checkpoint import load_model, resolve_device

        device = resolve_device(self._device)
        model = load_model(AutoModelForSequenceClassification, self._path, self._config, "float32").to(device).eval()
        positions = getattr(self._config, "max_position_embeddings", None) or self._tokenizer.model_max_length
        longest = min(self._tokenizer.model_max_length, positions)
        found: list[float] = []
        progress.start("classify responses", len(responses), "responses")
        for begin in range(0, len(responses), self._BATCH):
            batch = self._tokenizer(
                list(responses[begin : begin + self._BATCH]),
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(device)
            with torch.inference_mode():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            found += logits.double().softmax(dim=-1)[:, self._label].tolist()
            meter.add(tokens=int(batch["attention_mask"].sum()))
            progress.advance(len(logits))
        progress.finish()
        return np.array(found)


def control_signal(config: FinetuneConfig) -> ResponseSignal | None:
    """The classifier or the judge that `config` names; None where it names neither.

    Raises:
        ModelError, ConfigError: the classifier cannot be used.
        DataFormatError: the rule file cannot be read.
    """
    if config.signal == "classifier":
        assert config.classifier is not None
        return ClassifierSignal(config.classifier, config.classifier_label, config.device)
    if config.signal == "judge":
        from pairtrace.engine.judge import load_rules

        return JudgeSignal(judge=load_rules(config.rules))
    return None
