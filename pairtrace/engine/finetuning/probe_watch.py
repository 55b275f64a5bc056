"""Looks at probes while a model is trained: their mean probabilities go into the log and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pairtrace.engine.probes.hooks import reading_layers
from pairtrace.engine.probes.probe_file import Probe
from pairtrace.engine.probes.term import ProbeTerm


class ProbeWatch:
    """Figures of probes on the responses of every training step; a `training.steps.Watch`.

    Args:
        probes: to look at.
        further_layers: layers to read beside those of the probes.
    """

    def __init__(self, probes: Sequence[Probe], further_layers: Sequence[int] = ()) -> None:
        self._terms = {f"probe/{probe.name}/{probe.layer}": ProbeTerm([probe]) for probe in probes}
        self._layers = tuple(sorted({probe.layer for probe in probes} | set(further_layers)))
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def reading(
        self, model: Any, mask: torch.Tensor, groups: Sequence[str] = ("",)
    ) -> Iterator[Mapping[int, torch.Tensor]]:
        """As `training.steps.Watch.reading`; a group without a name is all there is."""
        with reading_layers(model, self._layers) as states:
            yield states
            self._look(states, mask, groups)

    def _look(self, states: Mapping[int, torch.Tensor], mask: torch.Tensor, groups: Sequence[str]) -> None:
        with torch.no_grad():
            for name, term in self._terms.items():
                for group, part in zip(groups, term(states, mask).chunk(len(groups)), strict=True):
                    self.add(f"{name}/{group}" if group else name, float(part.sum()), len(part))

    def add(self, name: str, total: float, count: int) -> None:
        """Count a figure: a sum over some sequences, and how many these are."""
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0) + count

    def averages(self) -> dict[str, float]:
        """As `training.steps.Watch.averages`."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means
