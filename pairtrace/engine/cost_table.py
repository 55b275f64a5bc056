"""Cost records of several products in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pairtrace.engine.cost import CostRecord, Prices, costs_path, read_costs
from pairtrace.engine.training.run_directory import COSTS as TRAINING_COSTS
from pairtrace.engine.training.run_directory import RunDirectory
from pairtrace.errors import DataFormatError

TOTAL = "total"
_SUMMED = ("wall_seconds", "device_seconds", "model_tokens", "flops", "api_prompt_tokens", "api_completion_tokens")


@dataclass(frozen=True, kw_only=True)
class CostLine:
    """One line of the table: all runs of a stage, or of a method where `stage` is "total".

    The figures are those of `CostRecord`, added up over the runs; of `peak_memory_bytes` it is the largest. A gradient
    baseline with `--procedure published` counts as a method of its own.
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


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Costs of several products.

    Attributes:
        lines: stages by method, in order of appearance, then each method's total.
        problems: for each product that could not be counted, why.
    """

    lines: tuple[CostLine, ...]
    problems: tuple[str, ...]


def cost_table(products: Sequence[str | Path], prices: Prices) -> CostTable:
    """The table over several products, directories of trained checkpoints, or costs files.

    A file that is named twice counts once. What has no costs, or damaged ones, becomes a problem and leaves the others
    standing.

    Raises:
        DataFormatError: no product can be counted.
    """
    problems: dict[str, None] = {}
    by_method: dict[str, dict[str, list[CostRecord]]] = {}
    for path, product in {_costs_of(product).resolve(): product for product in products}.items():
        if not path.exists():
            problems[_missing(Path(product), path)] = None
            continue
        try:
            records = read_costs(path)
        except DataFormatError as error:
            problems[str(error)] = None
            continue
        for record in records:
            by_method.setdefault(_method(record), {}).setdefault(record.stage, []).append(record)
    lines = []
    for method, stages in by_method.items():
        lines += [CostLine.of(method, stage, records, prices) for stage, records in stages.items()]
        every = [record for records in stages.values() for record in records]
        lines.append(CostLine.of(method, TOTAL, every, prices))
    if problems and not lines:
        raise DataFormatError("\nerror: ".join(problems))
    return CostTable(lines=tuple(lines), problems=tuple(problems))


def _costs_of(product: str | Path) -> Path:
    """A training keeps its costs inside its directory, an unfinished one inside `OUT.partial`."""
    path = Path(product)
    inside = (path / TRAINING_COSTS, RunDirectory(path).partial / TRAINING_COSTS)
    return next((file for file in inside if file.exists()), costs_path(path))


def _method(record: CostRecord) -> str:
    # The gradients of the published procedure cost many times what the batched ones do.
    return f"{record.method} (published)" if record.extra.get("procedure") == "published" else record.method


def _missing(product: Path, costs: Path) -> str:
    if not product.exists() or product.resolve() == costs:
        return f"there is no {product}; looked for its costs in {costs.name}"
    return f"{product} has no costs: there is no {costs.name} beside it; only pairtrace's own stages leave one"
