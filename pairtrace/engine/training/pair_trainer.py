"""TRL's DPO trainer on pairs that are tokens already.

What TRL would do by itself and must not do here, beside what `steps` keeps away: tokenise and drop rows without a
word, compute the reference from whatever `config._name_or_path` points to, and keep a second copy of the model for it.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from pairtrace.engine.checkpoint import quiet_transformers
from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.training.batches import StepBatches, pad_pairs
from pairtrace.engine.training.steps import GuardedSteps, Watch
from pairtrace.errors import TrainingError

_LIBRARIES = ("accelerate", "datasets", "peft", "trl")
# The first loss is that of equal models; this much is left to the rounding of bfloat16, at beta 0.1.
_FIRST_LOSS_TOLERANCE = 0.05

ReferencePass = Callable[[Callable[[dict[str, torch.Tensor]], torch.Tensor]], np.ndarray]
"""From a function that computes log-probabilities, [S], of a batch of S sequences, to those of all pairs, [N, 2]."""


class PairTrainer(GuardedSteps, DPOTrainer):
    """`DPOTrainer` with the batches, the reference and the order of pairtrace.

    Args:
        model: the policy; it is M0 still.
        args: of TRL.
        pairs: the pairs to train on.
        batches: their order.
        reference_pass: gives M0's log-probabilities; called once, before the first step.
        on_pass: is told the indices of the pairs of every forward and backward pass.
        on_save: is told the step of every checkpoint that has been written.
        watch: looks at chosen and rejected responses in every step.
        settings: further arguments of `DPOTrainer`: `peft_config`, `processing_class`, `callbacks`.
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
        watch: Watch | None = None,
        **settings: Any,
    ) -> None:
        from datasets import Dataset

        self._pairs = pairs
        self._reference_pass = reference_pass
        self._reference: np.ndarray | None = None
        self._guard([pair.row for pair in pairs], batches, on_pass, on_save, watch)
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

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        """TRL's loss of one batch.

        Raises:
            TrainingError: the loss is not finite, or the first one shows that the reference is not M0.
        """
        indices = inputs.pop("indices")
        with self._watching(model, inputs["completion_mask"]):
            loss = super().compute_loss(model, inputs, *arguments, **keywords)
        self._passed(indices, loss)
        if self.state.global_step == 0 and self.loss_types == ["sigmoid"]:
            away = abs(self.loss_now - math.log(2))
            if away > _FIRST_LOSS_TOLERANCE * max(1.0, self.beta / 0.1):
                raise TrainingError(
                    f"the first loss is {self.loss_now:.4f}, but a model that equals its reference has ln 2 = 0.6931: "
                    "the reference log-probabilities are not this checkpoint's; remove the reference cache"
                )
        return loss

    def _watching(self, model: Any, mask: torch.Tensor) -> AbstractContextManager[Any]:
        return nullcontext() if self._watch is None else self._watch.reading(model, mask, ("chosen", "rejected"))


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
