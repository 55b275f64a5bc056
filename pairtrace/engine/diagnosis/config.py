"""Settings of a diagnosis, and figures that could not be measured."""

from __future__ import annotations

from dataclasses import dataclass

from pairtrace.errors import ConfigError

# Fewer ranked pairs tell nothing about a tail.
FEWEST_PAIRS = 100
# The published edit took 30,000 of 378,339 pairs (8 %); the organism has 6 % planted.
TOP_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """What `diagnose` does.

    Attributes:
        scores: scores file, of any method.
        behavior: name; may be left out when the file has one behaviour.
        store: the activation store; None takes the path that the scores recorded.
        directions: direction file of the behaviour; None takes the path that the scores recorded.
        rollouts: rollouts file of the behaviour, whose rollouts are then read through the base model; None leaves the
            bootstrap over rollouts out.
        base: the base model that reads them; None takes the path that the direction file recorded.
        data: the preference data, for lengths in characters where there is no store; checked in any case.
        split: of a data set that has several.
        k: size of the top; None takes 5 % of the ranked pairs.
        resamples: bootstrap samples.
        null_directions: random directions of each kind; banks take as many as fit.
        seed: of the random directions and the bootstrap.
        device: that reads the rollouts.
    """

    scores: str
    behavior: str | None = None
    store: str | None = None
    directions: str | None = None
    rollouts: str | None = None
    base: str | None = None
    data: str | None = None
    split: str | None = None
    k: int | None = None
    resamples: int = 100
    null_directions: int = 256
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ConfigError(f"-k is {self.k}; expected at least 1")
        if self.resamples < 20:
            raise ConfigError(f"--resamples is {self.resamples}; expected at least 20")
        if self.null_directions < 16:
            raise ConfigError(f"--null-directions is {self.null_directions}; expected at least 16")
        if self.base is not None and self.rollouts is None:
            raise ConfigError("--base reads rollouts, but --rollouts was not given")


@dataclass(frozen=True, kw_only=True)
class NotMeasured:
    """A figure that the inputs do not allow.

    Attributes:
        not_measured: why, and what would allow it.
    """

    not_measured: str
