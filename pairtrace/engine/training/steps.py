"""What the trainers of pairtrace have in common, whatever TRL trainer they build on.

What TRL and transformers would do by themselves and must not do here: count a step's NaN as the mean of the last
losses, shuffle in an order of their own, write a model card, and report their use over the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from pairtrace.engine.progress import Progress
from pairtrace.engine.training.batches import StepBatches
from pairtrace.errors import TrainingError

# Rows that an error names.
_ROWS_NAMED = 4


class Watch(Protocol):
    """Looks at forward passes of training without a part in the loss."""

    def reading(
        self, model: Any, mask: torch.Tensor, groups: Sequence[str]
    ) -> AbstractContextManager[Mapping[int, torch.Tensor]]:
        """Read one forward pass inside.

        Args:
            model: that runs.
            mask: [S, T], the response tokens of the batch.
            groups: what the batch consists of, in parts of equal size, such as chosen and rejected sequences.

        Yields:
            The residual stream by layer, [S, T, D] each, once the model has run.
        """

    def averages(self) -> dict[str, float]:
        """Means of the figures since the last call."""


class GuardedSteps:
    """Goes before a trainer of TRL among the bases of a class; `_guard` is called before the trainer's `__init__`.

    Attributes:
        loss_now: loss of the last forward pass.
    """

    def _guard(
        self,
        rows: Sequence[int],
        batches: StepBatches,
        on_pass: Callable[[list[int]], None],
        on_save: Callable[[int], None],
        watch: Watch | None = None,
    ) -> None:
        """Set up.

        Args:
            rows: row number in the data of every example.
            batches: their order.
            on_pass: is told the indices of the examples of every forward and backward pass.
            on_save: is told the step of every checkpoint that has been written.
            watch: its figures go into the log.
        """
        self._rows = rows
        self._batches = batches
        self._on_pass = on_pass
        self._on_save = on_save
        self._watch = watch
        self._step_indices: list[int] = []
        self.loss_now = math.nan

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in pairtrace's order."""
        return _EpochLoader(self.train_dataset, batch_sampler=self._batches, collate_fn=self._collate)  # type: ignore[attr-defined]

    def _passed(self, indices: list[int], loss: torch.Tensor) -> None:
        """Count a forward pass.

        Raises:
            TrainingError: its loss is not finite.
        """
        self._step_indices += indices
        self.loss_now = float(loss)
        if not math.isfinite(self.loss_now):
            self._refuse(f"the loss is {self.loss_now}")
        self._on_pass(indices)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        if not math.isfinite(float(norm)):
            self._refuse(f"the norm of the gradient is {float(norm)}")
        self._step_indices = []
        return norm

    def _refuse(self, problem: str) -> None:
        rows = [self._rows[index] for index in self._step_indices]
        more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
        raise TrainingError(
            f"{problem} in step {self.state.global_step + 1}; try a smaller --learning-rate, a smaller "  # type: ignore[attr-defined]
            "--max-grad-norm, or --compute-dtype float32. The step did not change the weights, and earlier checkpoints "
            f"of the run are kept. Its examples are those of rows {', '.join(map(str, rows[:_ROWS_NAMED]))}{more}"
        )

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """The trainer's figures, and those of the watch."""
        if self._watch is not None and "loss" in logs:
            logs.update(self._watch.averages())
        super().log(logs, *arguments, **keywords)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self._on_save(self.state.global_step)  # type: ignore[attr-defined]

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: the record of the run says what was done."""

    def _send_telemetry(self) -> None:
        pass


class _EpochLoader(DataLoader[Any]):
    """Passes the epoch on to the batch sampler, as the trainer expects of its loader."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, StepBatches)
        self.batch_sampler.set_epoch(epoch)


class ProgressCallback(TrainerCallback):
    """Reports every step to pairtrace's progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.trainer: GuardedSteps | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One more step."""
        assert self.trainer is not None
        self._progress.advance(1, loss=self.trainer.loss_now)
        # An entry of the log is a mean since the last one, which a run that goes on from a checkpoint does not know.
        control.should_log = control.should_log or control.should_save
