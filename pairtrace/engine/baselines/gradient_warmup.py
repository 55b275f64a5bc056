"""The warm-up: a short DPO training of the adapter whose checkpoints the gradients are taken at.

LESS (arXiv 2402.04333, section 3.1) trains on 5 % of the data for four epochs with Adam and keeps the adapter and the
optimiser's moments after each epoch. Learning rate: linear warm-up over 3 % of the steps, then linear decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pairtrace.engine.baselines.gradient_config import GradientConfig
from pairtrace.engine.baselines.gradient_loss import PairBatch, batches, dpo_losses, log_probabilities
from pairtrace.engine.baselines.gradient_model import LoraModel
from pairtrace.engine.baselines.gradient_rows import (
    ADAM_BETAS,
    ADAM_EPSILON,
    DpoSettings,
    reference_log_probabilities,
)
from pairtrace.engine.baselines.gradient_work import WorkDirectory
from pairtrace.engine.cost import CostMeter
from pairtrace.engine.progress import Progress
from pairtrace.engine.rendered import RenderedPair
from pairtrace.errors import DataError

_WARMUP = 0.03
_GRADIENT_NORM = 1.0
_PARTS = ("adapter", "first", "second")


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """The adapter after an epoch of the warm-up.

    Attributes:
        adapter: parameters by name, float32.
        first: Adam's running mean of the gradients, by name.
        second: Adam's running mean of their squares, by name.
        learning_rate: mean over the steps of the epoch, LESS's weight of the checkpoint.
        step: steps of the optimiser so far.
        loss: mean over the pairs of the epoch.
    """

    adapter: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    learning_rate: float
    step: int
    loss: float

    def save(self, work: WorkDirectory, number: int) -> None:
        """Keep it as checkpoint `number`."""
        tensors = {f"{part}/{name}": value for part in _PARTS for name, value in getattr(self, part).items()}
        about = {"learning_rate": self.learning_rate, "step": self.step, "loss": self.loss}
        work.save_tensors(checkpoint_file(number), tensors, about)

    @classmethod
    def load(cls, work: WorkDirectory, number: int) -> Checkpoint:
        """Read checkpoint `number`.

        Raises:
            DataFormatError: the file is damaged.
        """
        tensors, about = work.tensors(checkpoint_file(number))
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        return cls(
            adapter=parts["adapter"],
            first=parts["first"],
            second=parts["second"],
            learning_rate=float(about["learning_rate"]),
            step=int(about["step"]),
            loss=float(about["loss"]),
        )


def checkpoint_file(number: int) -> str:
    """Name of a checkpoint within the work directory."""
    return f"warmup/checkpoint-{number}.safetensors"


def warmup_rows(usable: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows that the warm-up trains on: at least one, drawn without replacement. int64, ascending."""
    rows = np.flatnonzero(usable)
    count = max(1, round(share * len(rows)))
    return np.sort(np.random.default_rng([seed, 0]).choice(rows, count, replace=False))


def warm_up(
    model: LoraModel,
    pairs: list[RenderedPair],
    config: GradientConfig,
    token_budget: int,
    work: WorkDirectory,
    meter: CostMeter,
    progress: Progress,
) -> None:
    """Train the adapter and keep a checkpoint after each epoch; goes on after the last one that is there.

    Raises:
        DataError: the loss is not finite.
    """
    settings = DpoSettings(beta=config.beta, length_normalized=config.length_normalized)
    steps = math.ceil(len(pairs) / config.batch_pairs)
    optimizer = torch.optim.AdamW(
        list(model.parameters.values()), lr=config.learning_rate, betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=0.0
    )
    done = 0
    while done < config.checkpoints and work.has(checkpoint_file(done)):
        done += 1
    if done:
        _restore(model, optimizer, Checkpoint.load(work, done - 1))
    progress.start("gradient warm-up", (config.checkpoints - done) * len(pairs), "pairs")
    reference = _references(model, pairs, settings, token_budget, meter)
    for epoch in range(done, config.checkpoints):
        order = np.random.default_rng([config.seed, 2, epoch]).permutation(len(pairs))
        losses, rates = 0.0, []
        for step in range(steps):
            members = order[step * config.batch_pairs : (step + 1) * config.batch_pairs].tolist()
            rates.append(config.learning_rate * _rate(epoch * steps + step, config.checkpoints * steps))
            for group in optimizer.param_groups:
                group["lr"] = rates[-1]
            optimizer.zero_grad(set_to_none=True)
            loss = _accumulate(model, pairs, reference, members, settings, token_budget, meter)
            if not math.isfinite(loss):
                raise DataError(
                    f"the warm-up's loss is {loss} at step {epoch * steps + step + 1}; lower --learning-rate "
                    f"(now {config.learning_rate}), or compute in float32 with --compute-dtype"
                )
            torch.nn.utils.clip_grad_norm_(model.parameters.values(), _GRADIENT_NORM)
            optimizer.step()
            losses += loss * len(members)
            progress.advance(len(members), loss=loss)
        _checkpoint(model, optimizer, rates, (epoch + 1) * steps, losses / len(pairs)).save(work, epoch)
    progress.finish()


def _rate(step: int, total: int) -> float:
    warmup = max(1, round(total * _WARMUP))
    return (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)


def _references(
    model: LoraModel, pairs: list[RenderedPair], settings: DpoSettings, token_budget: int, meter: CostMeter
) -> Tensor:
    """float32 [pairs, 2] log-probabilities under M0."""
    found = torch.zeros(len(pairs), 2, device=model.device)
    for members in batches(pairs, token_budget):
        batch = PairBatch.of([pairs[member] for member in members], model.device)
        found[members] = reference_log_probabilities(model, batch, settings)
        meter.add(tokens=batch.tokens, flops=batch.forward_flops(model.shape, every_logit=False))
    return found


def _accumulate(
    model: LoraModel,
    pairs: list[RenderedPair],
    reference: Tensor,
    members: list[int],
    settings: DpoSettings,
    token_budget: int,
    meter: CostMeter,
) -> float:
    """Add the gradient of the mean loss of `members` to the parameters, in parts that fit the budget; the loss."""
    total = 0.0
    for part in batches([pairs[member] for member in members], token_budget):
        rows = [members[position] for position in part]
        batch = PairBatch.of([pairs[row] for row in rows], model.device)
        policy = log_probabilities(model.network, batch, length_normalized=settings.length_normalized)
        loss = dpo_losses(policy, reference[rows], settings.beta).sum() / len(members)
        loss.backward()
        total += loss.item()
        # Frozen matrices pass a gradient on but get none: their backward pass costs what their forward pass does.
        meter.add(tokens=batch.tokens, flops=2 * batch.forward_flops(model.shape, every_logit=False))
    return total


def _restore(model: LoraModel, optimizer: torch.optim.AdamW, checkpoint: Checkpoint) -> None:
    model.set_adapter(checkpoint.adapter)
    state: dict[int, dict[str, Any]] = {
        number: {
            "step": torch.tensor(float(checkpoint.step)),
            "exp_avg": checkpoint.first[name],
            "exp_avg_sq": checkpoint.second[name],
        }
        for number, name in enumerate(model.parameters)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _checkpoint(
    model: LoraModel, optimizer: torch.optim.AdamW, rates: list[float], step: int, loss: float
) -> Checkpoint:
    moments = {name: optimizer.state[parameter] for name, parameter in model.parameters.items()}
    return Checkpoint(
        adapter=model.adapter(),
        first={name: state["exp_avg"].cpu().clone() for name, state in moments.items()},
        second={name: state["exp_avg_sq"].cpu().clone() for name, state in moments.items()},
        learning_rate=sum(rates) / len(rates),
        step=step,
        loss=loss,
    )
