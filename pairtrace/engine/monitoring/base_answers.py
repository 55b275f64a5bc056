"""M0's own answers: those that every step is compared with, and further ones that show how far answers vary.

They depend on M0, the prompts and the sampling alone, so they are made once and kept under a name that says so. Legend:
P items, K further samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairtrace.engine.discovery.prompt_bag import PromptBag
from pairtrace.engine.monitoring.asked import Answer, AskedPrompts, answers_of
from pairtrace.engine.monitoring.config import MonitorConfig
from pairtrace.engine.rollout_file import read_rollouts

if TYPE_CHECKING:
    from pairtrace.engine.cost import CostMeter
    from pairtrace.engine.progress import Progress
    from pairtrace.engine.sampling import Sampler


@dataclass(frozen=True, kw_only=True)
class BaseAnswers:
    """What M0 answers.

    Attributes:
        reference: P answers.
        further: K times P answers.
    """

    reference: list[Answer]
    further: list[list[Answer]]


class BaseCache:
    """The files of one M0, bag and sampling.

    Args:
        directory: that monitors may share.
        identity: everything that decides what M0 answers, plain JSON values.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        self._directory = directory
        self._identity = identity

    def answers(
        self,
        asked: AskedPrompts,
        load: Callable[[], Sampler],
        config: MonitorConfig,
        progress: Progress,
        meter: CostMeter | None,
    ) -> BaseAnswers:
        """Read M0's answers, or let it answer.

        Args:
            asked: the P items.
            load: makes M0 ready to answer; called only where it has to.
            config: of the monitor.
            progress: counts responses.
            meter: counts tokens and operations.

        Raises:
            DataFormatError: the file is damaged.
            ModelError: M0 cannot be loaded, or memory does not suffice.
        """
        path = self._directory / f"{_digest(self._identity)}.rollouts.parquet"
        if path.exists():
            answers = answers_of(read_rollouts(path))
        else:
            sampler = load()
            answers = []
            for sample in range(1 + config.null_samples):
                answers += asked.ask(
                    sampler,
                    seed=(config.seed, "base", sample),
                    temperature=config.resampling_temperature if sample else config.temperature,
                    batch_size=config.batch_size,
                    stage=f"answers of M0, {sample + 1} of {1 + config.null_samples}",
                    progress=progress,
                    meter=meter,
                )
            asked.table(answers, manifest={"identity": self._identity}).write(path)
        size = len(asked)
        parts = [answers[first : first + size] for first in range(0, len(answers), size)]
        return BaseAnswers(reference=parts[0], further=parts[1:])

    def bag(self, sample: int, reading: dict[str, Any], read: Callable[[], PromptBag]) -> PromptBag:
        """The behaviour-change vectors of one of M0's further samples.

        Args:
            sample: number of the sample, from 0.
            reading: everything that decides the vectors beside the answers, plain JSON values.
            read: makes them; called only where it has to.

        Raises:
            DataError: the file is damaged.
        """
        identity = {**self._identity, **reading}
        path = self._directory / f"{_digest(identity)}.null-{sample}.safetensors"
        if path.exists():
            return PromptBag.load(path)[0]
        bag = read()
        bag.save(path, identity)
        return bag


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
