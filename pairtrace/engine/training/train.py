"""The training stage: a checkpoint and preference data become the checkpoint after DPO."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pairtrace.engine.cost import read_costs
from pairtrace.engine.memory import is_out_of_memory
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.training.config import TrainConfig
from pairtrace.engine.training.run_directory import COSTS, RunDirectory
from pairtrace.errors import ConfigError, MissingDependencyError, TrainingError

if TYPE_CHECKING:
    from pairtrace.engine.training.steps import Watch


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What a training run did.

    Attributes:
        out: directory of the trained checkpoint.
        rows: rows of the data; equals `trained + dropped`.
        trained: pairs that were trained on.
        dropped: rows that could not be; each is named in `pairtrace_train.json`.
        reasons: dropped rows by reason code.
        steps: optimizer steps, those of interrupted runs included.
        resumed_from: the step at which this run went on, 0 for a run from the start.
        reference_computed: sequences whose reference log-probability this run computed.
        reference_cached: distinct lookups that needed no forward pass.
        first_loss: loss of the first step; ln 2 for the plain DPO loss.
        last_loss: mean over the log's entries of the last tenth of the steps (the last entry in any case); an entry is
            the mean of its steps.
        last_accuracy: share of pairs whose implicit reward was right, over the same entries.
        tokens: tokens of the training passes of the process that finished the run, without padding.
        flops: of this process, its reference pass included.
        seconds: wall time of this process, loading included.
        all_processes: what the run cost with all that was interrupted, out of its costs file: `records` (one for each
            stage of each process), `wall_seconds` and `device_seconds` (without loading), `model_tokens` (those of the
            reference pass included) and `flops`.
        settings: the settings that decide the weights.
        already_complete: nothing was left to do.
    """

    out: str
    rows: int
    trained: int
    dropped: int
    reasons: dict[str, int]
    steps: int
    resumed_from: int
    reference_computed: int
    reference_cached: int
    first_loss: float | None
    last_loss: float | None
    last_accuracy: float | None
    tokens: int
    flops: float
    seconds: float
    all_processes: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    already_complete: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def train(config: TrainConfig, progress: Progress = NULL_PROGRESS, *, watch: Watch | None = None) -> TrainSummary:
    """Train a checkpoint with DPO, going on where an interrupted run stopped.

    Args:
        config: what to do.
        progress: receives the stages of the run.
        watch: looks at the forward passes; its figures go into the log, and the weights are the same without it.

    Raises:
        ConfigError: the output exists and is of another run, or an unfinished run had other settings.
        DataError: the data cannot be read, or no row can be trained on.
        MissingDependencyError: the extra `train` is not installed.
        ModelError: the checkpoint or its tokenizer cannot be used.
        TrainingError: the loss or a gradient is not finite, or memory does not suffice.
    """
    require_training()
    begun = time.perf_counter()
    from pairtrace.engine.training.dpo_run import run_dpo
    from pairtrace.engine.training.job import Job

    directory = RunDirectory(config.out)
    job = Job.prepare(config, config.open_source)
    done = directory.finished(job.identity)
    if done is not None:
        return TrainSummary(**{**done["summary"], "already_complete": True})
    lock = directory.begin(job.identity)
    try:
        with training_process(config.threads):
            outcome = run_dpo(job, directory, progress, watch)
        summary = TrainSummary(
            **outcome.figures,
            out=str(config.out),
            seconds=time.perf_counter() - begun,
            all_processes=total_costs(directory),
            settings=config.identity(),
        )
        record = {
            "summary": summary.to_dict(),
            "identity": job.identity,
            "versions": job.versions,
            "dropped": outcome.dropped,
            "log": outcome.log,
        }
        directory.publish(record)
    finally:
        lock.release()
    return summary


def total_costs(directory: RunDirectory) -> dict[str, float]:
    """What an unfinished run has cost, all its processes together."""
    records = read_costs(directory.partial / COSTS)
    names = ("wall_seconds", "device_seconds", "model_tokens", "flops")
    return {"records": len(records), **{name: sum(getattr(record, name) for record in records) for name in names}}


def require_training() -> None:
    """Find out before long work whether training is possible here.

    Raises:
        ConfigError: this is one of several processes.
        MissingDependencyError: the extra `train` is not installed.
    """
    from importlib.util import find_spec

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("pairtrace trains in one process; start it without accelerate launch or torchrun")
    missing = [name for name in ("trl", "peft", "accelerate", "datasets") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(" ".join(missing), "train", "training")


@contextmanager
def training_process(threads: int | None) -> Iterator[None]:
    """Training seeds the process's generators and may set its threads; the caller gets both back as they were.

    Raises:
        TrainingError: memory ran out inside.
    """
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"out of memory ({str(error).splitlines()[0]}); spread a step over more passes with a larger "
                "--accumulation, or give --gradient-checkpointing, a smaller --max-length or --lora"
            ) from error
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_num_threads(states[2])
