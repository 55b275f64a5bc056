"""Settings of the detectability report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.probes.config import ExamplesConfig
from pairtrace.errors import ConfigError

BEFORE = "before"


@dataclass(frozen=True, kw_only=True)
class DetectabilityConfig:
    """What `detectability` does.

    Attributes:
        prompts: prompt file, as for `evaluate`: the behaviour is measured on entries that are not benign, helpfulness
            on those that are.
        before: checkpoint from before the training.
        after: trained checkpoints, as NAME=DIRECTORY or as a directory, which is a name as well. Those with one name
            are runs of one method, with different seeds: the report gives their mean with its interval.
        probe: probe file; its probes belong to `before`.
        rollouts: judged responses of both classes, as for `probe train`. Every model reads the same ones: what a model
            says after training would hardly show the behaviour. Prompts that the probes were trained on serve to train
            new ones; all areas are measured on the other prompts.
        text: given responses, as for `finetune --method sft`, benign and new to all models: their loss is measured.
        out: report to write (.json); beside it go a figure (.svg), the evaluation of the responses and what an
            interrupted run goes on with.
        label_column, answers_of: of `rollouts`, as for `probe train`.
        layers: of the probes; None for the best one of the file.
        folds: of the cross-validation of the new probes.
        judged_share: share of the prompts that areas are measured on, where too few of `rollouts` were trained on to
            train new probes on the same.
        rules, refusal_rules, conditions, temperature, max_new_tokens, batch_size, seed, confidence, replicates, device,
            dtype, max_length, truncation, token_budget, chat_template, template_date: as for `EvaluateConfig`. One
            response is given to each request.
    """

    prompts: str
    before: str
    after: tuple[str, ...]
    probe: str
    rollouts: str
    out: str
    text: str | None = None
    label_column: str | None = None
    answers_of: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    folds: int = 5
    judged_share: float = 0.5
    rules: str | None = None
    refusal_rules: str | None = None
    conditions: tuple[str, ...] | None = None
    temperature: float = 0.0
    max_new_tokens: int = 256
    batch_size: int = 64
    seed: int = 0
    confidence: float = 0.95
    replicates: int = 2000
    device: str = "auto"
    dtype: str = "auto"
    max_length: int = 1024
    truncation: str = "keep_start"
    token_budget: int = 4096
    chat_template: str | None = None
    template_date: str | None = None

    def __post_init__(self) -> None:
        if not self.after:
            raise ConfigError("no trained checkpoint was given; name at least one after BEFORE")
        if not self.out.endswith(".json"):
            raise ConfigError(f"--out is {self.out!r}; reports end in .json")
        if BEFORE in [name for name, _ in self.runs]:
            raise ConfigError(f"{BEFORE!r} is the model before training; give the trained one another name")
        if self.folds < 2:
            raise ConfigError(f"--folds is {self.folds}; expected at least 2")
        if not 0 < self.judged_share < 1:
            raise ConfigError(f"--judged-share is {self.judged_share}; expected a share between 0 and 1")
        # What answering and reading have to say about their settings is said here.
        assert self.answering and self.reading(self.before)

    @property
    def runs(self) -> list[tuple[str, str]]:
        """Name and directory of every trained checkpoint."""
        found = []
        for given in self.after:
            name, sign, directory = given.partition("=")
            found.append((name, directory) if sign and name and directory else (Path(given).name, given))
        return found

    @property
    def answering(self) -> EvaluateConfig:
        """How the models answer and are judged.

        Raises:
            ConfigError: a setting is out of range, or a checkpoint is given twice.
        """
        return EvaluateConfig(
            prompts=self.prompts,
            models=(self.before, *(directory for _, directory in self.runs)),
            out=str(Path(self.out).with_suffix(".evaluation.json")),
            rules=self.rules,
            refusal_rules=self.refusal_rules,
            conditions=self.conditions,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=self.seed,
            confidence=self.confidence,
            replicates=self.replicates,
            device=self.device,
            dtype=self.dtype,
            max_length=self.max_length,
            truncation=self.truncation,
            token_budget=self.token_budget,
            chat_template=self.chat_template,
            template_date=self.template_date,
        )

    def reading(self, model: str, layers: tuple[int, ...] | None = None) -> ExamplesConfig:
        """How a model reads the judged responses.

        Raises:
            ConfigError: a setting is out of range.
        """
        return ExamplesConfig(
            rollouts=self.rollouts,
            label_column=self.label_column,
            answers_of=self.answers_of,
            model=model,
            layers=layers,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
            max_length=self.max_length,
            truncation=self.truncation,
            token_budget=self.token_budget,
            chat_template=self.chat_template,
            template_date=self.template_date,
        )
