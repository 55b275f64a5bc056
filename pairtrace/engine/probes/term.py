"""A probe as a term of a training loss: its probability, differentiable down to the model.

Legend: B sequences, T tokens, K members of an ensemble, D width.

    term = ProbeTerm(load_probes("probe.safetensors", roles=("training",), layers=(20,), model_fingerprint=...))
    with reading_layers(model, term.layers) as states:
        output = model(**batch)
        loss = output.loss + weight * term(states, batch["labels"] != -100).mean()
        loss.backward()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pairtrace.engine.probes.probe_file import Probe
from pairtrace.errors import ExamplesError, ProbeMismatchError


class ProbeTerm:
    """The probability of one probe, or the mean over several, such as those of other layers.

    It is no `torch.nn.Module`: a trainer must not train, save or cast it with the model. It follows the hidden states
    to their device, and computes in float32 (float64 for float64 states) whatever the dtype of the model.

    Args:
        probes: at least one. Every probe counts as one in the mean, and every member as one within its probe.

    Attributes:
        layers: residual layers that are needed, ascending, without repeats.
        names: of the probes, in their order.
    """

    def __init__(self, probes: Sequence[Probe]) -> None:
        assert probes
        self.layers = tuple(sorted({probe.layer for probe in probes}))
        self.names = tuple(probe.name for probe in probes)
        self._probes = tuple(probes)
        self._placed: dict[tuple[torch.device, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def __call__(self, states: Mapping[int, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """The probability that a response shows the behaviour.

        Args:
            states: hidden states by layer, [B, T, D] each, of any float dtype; layer l is the residual stream after l
                blocks (`hooks.reading_layers` gives them).
            mask: [B, T], bool or 0 and 1: the tokens of the response. A probe is trained on the mean over the tokens
                with loss, so that `labels != -100` is the mask that fits; not shifted. A row is one sequence: batches
                that several are packed into have to be taken apart first.

        Returns:
            float32 [B] (float64 for float64 states), between 0 and 1.

        Raises:
            ProbeMismatchError: a layer is not among the states, or has another width or shape.
            ExamplesError: a sequence has no response token.
        """
        return torch.stack([logits.sigmoid().mean(dim=1) for logits in self.logits(states, mask)]).mean(dim=0)

    def logits(self, states: Mapping[int, torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
        """Of each probe, in order, the logits of its members, [B, K]; arguments and errors as for a call."""
        means = {layer: mean_activation(self._state(states, layer), mask) for layer in self.layers}
        result = []
        for probe, (weight, bias) in zip(self._probes, self._weights(means[self.layers[0]]), strict=True):
            mean = means[probe.layer]
            if mean.shape[1] != probe.width:
                raise ProbeMismatchError(
                    f"the probe {probe.name!r} belongs to a model of another width", probe.width, mean.shape[1]
                )
            # Under autocast the product would be one of bfloat16.
            with torch.autocast(mean.device.type, enabled=False):
                result.append(mean @ weight.T + bias)
        return result

    def _state(self, states: Mapping[int, torch.Tensor], layer: int) -> torch.Tensor:
        if layer not in states:
            raise ProbeMismatchError(
                "the model was not read at the layer of the probe", layer, ", ".join(map(str, states)) or "no layer"
            )
        return states[layer]

    def _weights(self, like: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        key = (like.device, like.dtype)
        if key not in self._placed:
            # A monitor may be the first to ask, in inference mode, whose tensors could not take part in training.
            with torch.inference_mode(False):
                self._placed[key] = [
                    (
                        torch.tensor(probe.weight, device=like.device, dtype=like.dtype),
                        torch.tensor(probe.bias, device=like.device, dtype=like.dtype),
                    )
                    for probe in self._probes
                ]
        return self._placed[key]


def mean_activation(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean hidden state over the tokens of a mask.

    Args:
        hidden: [B, T, D], of any float dtype.
        mask: [B, T], bool or 0 and 1.

    Returns:
        float32 [B, D]; float64 for float64 states.

    Raises:
        ProbeMismatchError: mask and states differ in shape.
        ExamplesError: a sequence has no token in the mask.
    """
    if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
        raise ProbeMismatchError(
            "the mask of the response tokens does not fit the hidden states [B, T, D]",
            list(hidden.shape[:2]),
            list(mask.shape),
        )
    chosen = mask.to(device=hidden.device, dtype=torch.bool)
    counts = chosen.sum(dim=1)
    if not bool(counts.all()):
        empty = int((counts == 0).nonzero()[0])
        raise ExamplesError(f"sequence {empty} of the batch has no response token", "at least 1", 0)
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    # Filled, not multiplied: padding may hold NaN.
    summed = wide.masked_fill(~chosen[:, :, None], 0.0).sum(dim=1)
    return summed / counts[:, None]
