"""Cost records of several products in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pairtrace.engine.cost import CostRecord, Prices, costs_path, read_costs

TOTAL = "total"
_SUMMED = ("wall_seconds", "device_seconds", "model_tokens", "flops", "api_prompt_tokens", "api_completion_tokens")


@dataclass(frozen=True, kw_only=True)
class CostLine:
    """One line of the table: all runs of a stage, or of a method where `stage` is "total".

    The figures are those of `CostRecord`, added up over the runs; of `peak_memory_bytes` it is the largest.
    `money` is at the prices given.
    """

    method: str
    stage: str
    runs: int
    wall_seconds: float
    device_seconds: float
    model_tokens: int
    flops: float
    peak_memory_bytes: int
    api_prompt_tokens: int
    api_completion_tokens: int
    money: float

    def to_dict(self) -> dict[str, Any]:
        """The line as plain JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, method: str, stage: str, records: Sequence[CostRecord], prices: Prices) -> CostLine:
        """Add up records."""
        return cls(
            method=method,
            stage=stage,
            runs=len(records),
            **{name: sum(getattr(record, name) for record in records) for name in _SUMMED},
            peak_memory_bytes=max(record.peak_memory_bytes for record in records),
            money=sum(record.money(prices) for record in records),
        )


def cost_table(products: Sequence[str | Path], prices: Prices) -> list[CostLine]:
    """The table over several products or costs files: stages by method, in order of appearance, then each total.

    A file that is named twice counts once.

    Raises:
        DataFormatError: a product has no costs file, or it is damaged.
    """
    paths = dict.fromkeys(costs_path(product).resolve() for product in products)
    by_method: dict[str, dict[str, list[CostRecord]]] = {}
    for path in paths:
        for record in read_costs(path):
            by_method.setdefault(record.method, {}).setdefault(record.stage, []).append(record)
    lines = []
    for method, stages in by_method.items():
        lines += [CostLine.of(method, stage, records, prices) for stage, records in stages.items()]
        every = [record for records in stages.values() for record in records]
        lines.append(CostLine.of(method, TOTAL, every, prices))
    return lines
