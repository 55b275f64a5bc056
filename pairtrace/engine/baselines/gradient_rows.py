"""The gradient of the DPO loss of each pair with respect to the adapter, in two ways that give the same numbers.

A gradient is handed over matrix by matrix, in the order of `LoraModel.parameters`, so that a batch never needs memory
for B whole gradients.

Legend: B pairs, T tokens of the longest row, n entries of a matrix, P parameters of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pairtrace.engine.baselines.gradient_loss import PairBatch, dpo_losses, log_probabilities
from pairtrace.engine.baselines.gradient_model import LoraModel
from pairtrace.errors import UnsupportedModelError

# Of Adam, as LESS and PyTorch have them.
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8

Parts = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class DpoSettings:
    """Of the loss: beta, and whether log-probabilities are per response token."""

    beta: float
    length_normalized: bool


@torch.no_grad()
def reference_log_probabilities(model: LoraModel, batch: PairBatch, settings: DpoSettings) -> Tensor:
    """float32 [B, 2] of chosen and rejected under M0."""
    with model.reference():
        return log_probabilities(model.network, batch, length_normalized=settings.length_normalized)


def batched_gradients(model: LoraModel, batch: PairBatch, reference: Tensor, settings: DpoSettings) -> Parts:
    """Gradients of all pairs of a batch out of one backward pass.

    A matrix W of the adapter is passed once, y = W x, and each row of the batch belongs to one pair, so that pair's
    gradient is the sum over its tokens of the outer products of dL/dy and x (Goodfellow, arXiv 1510.01799). Only
    dL/dy is asked of autograd: the sum over the batch, which nobody needs, is never made.

    Args:
        model: with the adapter of a checkpoint.
        batch: of pairs.
        reference: float32 [B, 2] from `reference_log_probabilities`.
        settings: of the loss.

    Yields:
        Name of a matrix and float32 [B, n].

    Raises:
        UnsupportedModelError: see `LoraModel.recording`.
    """
    with model.recording() as calls:
        policy = log_probabilities(model.network, batch, length_normalized=settings.length_normalized)
    loss = dpo_losses(policy, reference, settings.beta).sum()
    outward = torch.autograd.grad(loss, [call.output for call in calls])
    found = {call.name: (call, gradient) for call, gradient in zip(calls, outward, strict=True)}
    pairs = len(batch.pairs)
    per_pair = batch.ids.shape[1] - 1
    for name, parameter in model.parameters.items():
        call, gradient = found[name]
        rows, columns = parameter.shape
        if call.input.numel() != 2 * pairs * per_pair * columns:
            raise UnsupportedModelError(
                f"{name} is not passed once by every token, so batched per-pair gradients would be wrong; give "
                "--procedure published"
            )
        # Chosen and rejected of a pair stand next to each other, so both count as one row of 2 (T - 1) tokens.
        inward = call.input.reshape(pairs, 2 * per_pair, columns)
        outer = torch.bmm(gradient.reshape(pairs, 2 * per_pair, rows).transpose(1, 2), inward)
        yield name, outer.flatten(1)


def published_gradients(model: LoraModel, batch: PairBatch, settings: DpoSettings) -> Parts:
    """The gradient of one pair as the published code makes it: every logit, the reference pass, then `backward`.

    Args:
        model: with the adapter of a checkpoint.
        batch: of a single pair.
        settings: of the loss.

    Yields:
        Name of a matrix and float32 [1, n].
    """
    assert len(batch.pairs) == 1
    options = {"length_normalized": settings.length_normalized, "every_logit": True}
    with torch.no_grad(), model.reference():
        reference = log_probabilities(model.network, batch, **options)
    model.network.zero_grad(set_to_none=True)
    policy = log_probabilities(model.network, batch, **options)
    dpo_losses(policy, reference, settings.beta).sum().backward()
    for name, parameter in model.parameters.items():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        yield name, gradient.reshape(1, -1)
    model.network.zero_grad(set_to_none=True)


def adam_directions(gradients: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What Adam would do next if it saw each pair alone (LESS, arXiv 2402.04333, section 3.1, without bias correction).

    `(b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps)`, eps inside the root as in the authors' code. The bias
    corrections would scale all pairs of a checkpoint alike, up to eps, which cosines do not see.

    Args:
        gradients: float32 [B, n].
        first: float32 [n], Adam's running mean m of the gradients.
        second: float32 [n], the running mean v of their squares.

    Returns:
        float32 [B, n].
    """
    beta1, beta2 = ADAM_BETAS
    numerator = torch.add(beta1 * first, gradients, alpha=1 - beta1)
    denominator = torch.addcmul(beta2 * second + ADAM_EPSILON, gradients, gradients, value=1 - beta2)
    return numerator / denominator.sqrt_()
