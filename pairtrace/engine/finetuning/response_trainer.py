"""TRL's SFT trainer on given responses that are tokens already, with the probability of probes in its loss.

The loss of a step is the mean over its response tokens of the negative log-probability, and the weight times the mean
over its responses of the probes' probability, however many forward passes the step is spread over:

    L = -1/T sum_t log p(y_t | y_<t) + w/B sum_b P(mean over the response tokens of b of the residual stream)

(arXiv 2510.21531). The probes are frozen; the gradient of P goes through all blocks up to the layer of the probe.
Responses that are not to be imitated have no part in the first sum.

Legend: B responses of a step, T response tokens of a step that are imitated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from pairtrace.engine.finetuning.example_rendering import RenderedExample
from pairtrace.engine.finetuning.probe_watch import ProbeWatch
from pairtrace.engine.probes.term import ProbeTerm
from pairtrace.engine.training.batches import StepBatches, pad_sides
from pairtrace.engine.training.steps import GuardedSteps

_NO_LOSS = -100


class ResponseTrainer(GuardedSteps, SFTTrainer):
    """`SFTTrainer` with the batches and the order of pairtrace, and a term of probes.

    Args:
        model: to train.
        args: of TRL.
        examples: the responses to train on.
        imitated: bool [N], those whose log-probability counts; for the others the term alone does.
        batches: their order.
        term: the probes to train against; None for plain fine-tuning.
        weight: of the term.
        watch: looks at probes; it reads the layers of the term as well, and is there when the term is.
        on_pass: is told the indices of the examples of every forward and backward pass.
        on_save: is told the step of every checkpoint that has been written.
        settings: further arguments of `SFTTrainer`: `peft_config`, `processing_class`, `callbacks`.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        examples: list[RenderedExample],
        imitated: np.ndarray,
        batches: StepBatches,
        term: ProbeTerm | None,
        weight: float,
        watch: ProbeWatch | None,
        on_pass: Callable[[list[int]], None],
        on_save: Callable[[int], None],
        **settings: Any,
    ) -> None:
        from datasets import Dataset

        assert term is None or watch is not None
        self._examples, self._imitated = examples, imitated
        self._term = term
        self._weight = weight
        self._probes = watch
        self._step_examples = 0
        self._guard([example.row for example in examples], batches, on_pass, on_save, watch)
        # The trainer looks for labels, and takes none from here.
        numbers = Dataset.from_dict({"index": list(range(len(examples))), "labels": [[0]] * len(examples)})
        super().__init__(model, args=args, train_dataset=numbers, data_collator=self._collate, **settings)
        self.remove_callback(PrinterCallback)  # prints to stdout

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        indices = [row["index"] for row in rows]
        sides = [(self._examples[index].ids, self._examples[index].start) for index in indices]
        batch = pad_sides(sides, self._tokenizer.pad_token_id or 0)
        response = batch.pop("completion_mask") != 0
        imitated = response & torch.from_numpy(self._imitated[indices, None])
        labels = batch["input_ids"].masked_fill(~imitated, _NO_LOSS)
        return {**batch, "labels": labels, "response": response, "indices": indices}

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # rendered already, with reasons for what is left out

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        """The batches of a step; how many responses they hold is what the term is divided by."""
        batches, tokens = super().get_batch_samples(*arguments, **keywords)
        self._step_examples = sum(len(batch["indices"]) for batch in batches)
        return batches, tokens

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        """The part of a step's loss that one batch brings.

        Raises:
            TrainingError: the loss is not finite.
            ProbeMismatchError: the model has another width than the probes.
        """
        indices = inputs.pop("indices")
        mask = inputs.pop("response")
        with self._reading(model, mask) as states:
            loss = super().compute_loss(model, inputs, *arguments, **keywords)
            # TRL divides by the tokens of the whole step where it knows them, and by the number of passes else.
            responses = self._step_examples if keywords.get("num_items_in_batch") is not None else len(indices)
            if self._term is not None:
                assert self._probes is not None
                probabilities = self._term(states, mask)
                self._probes.add("probe/term", float(probabilities.detach().sum()), len(indices))
                loss = loss + self._weight * probabilities.sum() / responses
        # What is shown is the loss of a step, as far as this pass tells, and not this pass's part of it.
        self._passed(indices, loss * (responses / len(indices)))
        return loss

    def _reading(self, model: Any, mask: torch.Tensor) -> AbstractContextManager[Mapping[int, torch.Tensor]]:
        return nullcontext({}) if self._probes is None else self._probes.reading(model, mask)
