"""The settings of training and evaluating probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pairtrace.engine.directions import direction_name
from pairtrace.engine.probes.probe_file import ROLES, Role
from pairtrace.errors import ConfigError

Vary = Literal["bootstrap", "seeds"]
DEFAULT_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """Where examples come from: a store with sides, or judged responses that are read through a model.

    Attributes:
        store: activation store made with `--sides`. The chosen response of each pair is an example of class 1, the
            rejected one of class 0; with `label_column` see there.
        data: where the data of the store is; None for the path that it recorded. The prompts are read from it.
        label_column: of the data of a store: the class (true or 1, false or 0, nothing to leave the pair out) of one
            response of each pair, the one that `side` names; the other one is not used, for nothing is known of it.
            Of `rollouts`: the column with the verdicts; None for `verdict` or `behavior`, whichever is there.
        side: "chosen" or "rejected".
        allow_incomplete: use the finished rows of a store that still misses some.
        rollouts: judged responses: what `behavior` (`*.rollouts.parquet`) or `evaluate` (`*.responses.parquet`) left,
            or a file (.parquet, .jsonl, .jsonl.gz) with `response`, `messages` or `prompt`, a verdict, and preferably
            `prompt_id`. Class 1 shows the behaviour; responses without a verdict are left out.
        answers_of: use the responses of these models only, as the column `model` names them; empty for all.
        model: checkpoint that `rollouts` are read through.
        layers: residual layers; None for those of the store, and with `rollouts` for all from 1 on.
        max_rows: examples in memory at most. With a store the mean, the variance, the class means and all figures are
            taken from all rows as they stream by; only the solver is given this many, drawn at random. It needs about
            20 bytes x max_rows x width. With `rollouts` this many responses are read, and kept for every layer.
        seed: of everything random.
        device, dtype, max_length, truncation, token_budget, chat_template, template_date: of the reading, as for
            `BehaviorConfig`.
    """

    store: str | None = None
    data: str | None = None
    label_column: str | None = None
    side: str = "chosen"
    allow_incomplete: bool = False
    rollouts: str | None = None
    answers_of: tuple[str, ...] = ()
    model: str | None = None
    layers: tuple[int, ...] | None = None
    max_rows: int = 20_000
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    max_length: int = 1024
    truncation: str = "keep_start"
    token_budget: int | None = None
    chat_template: str | None = None
    template_date: str | None = None

    def __post_init__(self) -> None:
        if (self.store is None) == (self.rollouts is None):
            given = "neither" if self.store is None else "both"
            raise ConfigError(f"give either --store, a store with sides, or --rollouts, judged responses; got {given}")
        if self.rollouts is not None and self.model is None:
            raise ConfigError("--rollouts are responses as text; say with --model which checkpoint reads them")
        if self.store is not None and (self.model is not None or self.answers_of):
            raise ConfigError("--model and --answers-of belong to --rollouts: a store was read through its own model")
        if self.rollouts is not None and self.data is not None:
            raise ConfigError("--data says where the data of a --store is; --rollouts bring their prompts")
        if self.side not in ("chosen", "rejected"):
            raise ConfigError(f"--side is {self.side!r}; expected chosen or rejected")
        if self.layers is not None and not self.layers:
            raise ConfigError("--layers names no layer; expected at least one, or leave it out for all")
        if self.max_rows < 2:
            raise ConfigError(f"--max-rows is {self.max_rows}; expected at least 2")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; expected 0 or more")
        if self.max_length < 0:
            raise ConfigError(f"--max-length is {self.max_length}; expected a positive number, or 0 for no limit")


@dataclass(frozen=True, kw_only=True)
class ProbeTrainConfig(ExamplesConfig):
    """What `train_probes` does.

    Attributes:
        out: probe file to write (.safetensors).
        name: of the behaviour; None takes the stem of `out`. Held-out probes are `{name}-held-out-1` and so on, the
            baseline is `{name}-mean-difference`.
        strengths: values of C, the inverse of the regularisation, of which cross-validation takes the best.
        folds: of the cross-validation; a prompt is in one of them.
        test_share: share of the prompts that is kept out of training, and that all figures are taken from.
        members: probes in the ensemble; 1 for a single probe.
        vary: what the members differ in: "bootstrap" (prompts drawn with replacement) or "seeds" (four fifths of them).
            Probes of several layers are an ensemble as well: see `ProbeTerm`.
        hold_out: further probes for monitoring only, each a single one on prompts drawn like those of a member.
        confidence: level of the intervals.
        bins: of the reliability diagram.
    """

    out: str
    name: str | None = None
    strengths: tuple[float, ...] = DEFAULT_STRENGTHS
    folds: int = 5
    test_share: float = 0.2
    members: int = 1
    vary: Vary = "bootstrap"
    hold_out: int = 0
    confidence: float = 0.95
    bins: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out.endswith(".safetensors"):
            raise ConfigError(f"--out is {self.out!r}; probe files end in .safetensors")
        if not self.strengths or not all(0 < strength < float("inf") for strength in self.strengths):
            raise ConfigError(f"--strengths is {self.strengths}; expected positive numbers")
        if self.folds < 2:
            raise ConfigError(f"--folds is {self.folds}; expected at least 2")
        if not 0 < self.test_share < 1:
            raise ConfigError(f"--test-share is {self.test_share}; expected a share between 0 and 1")
        if self.members < 1 or self.hold_out < 0:
            raise ConfigError(
                f"--members is {self.members} and --hold-out {self.hold_out}; expected at least 1 and at least 0"
            )
        if self.vary not in ("bootstrap", "seeds"):
            raise ConfigError(f"--vary is {self.vary!r}; expected bootstrap or seeds")
        require_figures(self.confidence, self.bins)
        assert self.probe_name

    @property
    def probe_name(self) -> str:
        """The name of the behaviour.

        Raises:
            DirectionError: it cannot name a behaviour.
        """
        return direction_name(self.name, self.out)


@dataclass(frozen=True, kw_only=True)
class ProbeEvalConfig(ExamplesConfig):
    """What `evaluate_probes` does.

    Attributes:
        probe: probe file.
        out: report to write (.json); None for none.
        roles: only probes of these roles; empty for all.
        include_training: use examples of prompts that the probes were trained on as well.
        confidence: level of the intervals.
        bins: of the reliability diagram.
    """

    probe: str
    out: str | None = None
    roles: tuple[Role, ...] = ()
    include_training: bool = False
    confidence: float = 0.95
    bins: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None and not self.out.endswith(".json"):
            raise ConfigError(f"--out is {self.out!r}; reports end in .json")
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown:
            raise ConfigError(f"--roles names {unknown[0]!r}; expected some of {', '.join(ROLES)}")
        require_figures(self.confidence, self.bins)


def require_figures(confidence: float, bins: int) -> None:
    """ConfigError for a level outside 0 to 1, or fewer than one bin."""
    if not 0 < confidence < 1:
        raise ConfigError(f"--confidence is {confidence}; expected a number between 0 and 1, such as 0.95")
    if bins < 1:
        raise ConfigError(f"--bins is {bins}; expected at least 1")
