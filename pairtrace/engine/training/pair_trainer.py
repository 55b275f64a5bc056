"""TRL's DPO trainer on pairs that are tokens already.

What TRL would do by itself and must not do here: tokenise and drop rows without a word, compute the reference from
whatever `config._name_or_path` points to, keep a second copy of the model for it, count a step's NaN as the mean of
the last losses, and report its use over the network.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from pairtrace.engine.checkpoint import quiet_transformers
from pairtrace.engine.progress import Progress
from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.training.batches import StepBatches, pad_pairs
from pairtrace.errors import TrainingError

_LIBRARIES = ("accelerate", "datasets", "peft", "trl")
# The first loss is that of equal models; this much is left to the rounding of bfloat16, at beta 0.1.
_FIRST_LOSS_TOLERANCE = 0.05

# Rows that an error names.
_ROWS_NAMED = 4

ReferencePass = Callable[[Callable[[dict[str, torch.Tensor]], torch.Tensor]], np.ndarray]
"""From a function that computes log-probabilities, [S], of a batch of S sequences, to those of all pairs, [N, 2]."""


class PairTrainer(DPOTrainer):
    """`DPOTrainer` with the batches, the reference and the order of pairtrace.

    Args:
        model: the policy; it is M0 still.
        args: of TRL.
        pairs: the pairs to train on.
        batches: their order.
        reference_pass: gives M0's log-probabilities; called once, before the first step.
        on_pass: is told the indices of the pairs of every forward and backward pass.
        on_save: is told the step of every checkpoint that has been written.
        settings: further arguments of `DPOTrainer`: `peft_config`, `processing_class`, `callbacks`.

    Attributes:
        loss_now: loss of the last forward pass.
    """

    def __init__(
        self,
        model: Any,
        args: DPOConfig,
        *,
        pairs: list[RenderedPair],
        batches: StepBatches,
        reference_pass: ReferencePass,
        on_pass: Callable[[list[int]], None],
        on_save: Callable[[int], None],
        **settings: Any,
    ) -> None:
        from datasets import Dataset

        self._pairs = pairs
        self._batches = batches
        self._reference_pass = reference_pass
        self._reference: np.ndarray | None = None
        self._on_pass = on_pass
        self._on_save = on_save
        self._step_pairs: list[int] = []
        self.loss_now = math.nan
        numbers = Dataset.from_dict({"index": list(range(len(pairs)))})
        super().__init__(model, args=args, train_dataset=numbers, data_collator=self._collate, **settings)
        assert self._reference is not None, "TRL must ask for the reference through _precompute_ref_logps"
        self.remove_callback(PrinterCallback)  # prints to stdout

    def _collate(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        indices = [row["index"] for row in rows]
        assert self._reference is not None
        pairs = [self._pairs[index] for index in indices]
        padding = self._tokenizer.pad_token_id or 0
        return {**pad_pairs(pairs, self._reference[indices], padding), "indices": indices}

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # rendered already, with reasons for what is left out

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        def compute(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            on_device = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            return torch.cat(self.compute_ref_log_probs(self.model, on_device))

        was_training = self.model.training
        self.model.eval()
        self._reference = self._reference_pass(compute)
        self.model.train(was_training)
        return dataset

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in pairtrace's order."""
        return _EpochLoader(self.train_dataset, batch_sampler=self._batches, collate_fn=self._collate)

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        """TRL's loss of one batch.

        Raises:
            TrainingError: the loss is not finite, or the first one shows that the reference is not M0.
        """
        indices = inputs.pop("indices")
        loss = super().compute_loss(model, inputs, *arguments, **keywords)
        self._step_pairs += indices
        self.loss_now = float(loss)
        if not math.isfinite(self.loss_now):
            self._refuse(f"the loss is {self.loss_now}")
        if self.state.global_step == 0 and self.loss_types == ["sigmoid"]:
            away = abs(self.loss_now - math.log(2))
            if away > _FIRST_LOSS_TOLERANCE * max(1.0, self.beta / 0.1):
                raise TrainingError(
                    f"the first loss is {self.loss_now:.4f}, but a model that equals its reference has ln 2 = 0.6931: "
                    "the reference log-probabilities are not this checkpoint's; remove the reference cache"
                )
        self._on_pass(indices)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(float(norm)):
            self._refuse(f"the norm of the gradient is {float(norm)}")
        self._step_pairs = []
        return norm

    def _refuse(self, problem: str) -> None:
        rows = [self._pairs[index].row for index in self._step_pairs]
        more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
        raise TrainingError(
            f"{problem} in step {self.state.global_step + 1}; try a smaller --learning-rate, a smaller "
            "--max-grad-norm, or --compute-dtype float32. The step did not change the weights, and earlier checkpoints "
            f"of the run are kept. Its pairs are those of rows {', '.join(map(str, rows[:_ROWS_NAMED]))}{more}"
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._on_save(self.state.global_step)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: `pairtrace_train.json` says what was done."""

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
        self.trainer: PairTrainer | None = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """One more step."""
        assert self.trainer is not None
        self._progress.advance(1, loss=self.trainer.loss_now)


def drop_attention_mask(model: Any) -> None:
    """Let the backbone run without the mask of padding, which right padding under causal attention does not need.

    No token attends to padding that stands to its right, and the loss reads no padded position: the values are the
    same, and the attention kernels without a mask are the fast ones.
    """

    def drop(_: Any, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**keywords, "attention_mask": None}

    model.base_model.register_forward_pre_hook(drop, with_kwargs=True)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' notes, bars and warnings about their own future."""
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
