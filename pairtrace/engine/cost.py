"""What a stage cost: time, device time, tokens, operations, memory, and money at stated prices.

Every stage measures itself with a `CostMeter` and leaves its record beside its product: `scores.parquet` gets
`scores.costs.jsonl`. A resumed run adds a record of its own, and a long stage saves its record now and then, so that
the cost of an interrupted run counts as well.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pairtrace.engine.atomic import replacing
from pairtrace.errors import ConfigError, DataFormatError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SUFFIX = ".costs.jsonl"
# Device of a stage whose model runs on somebody else's machine: it holds no device here and is paid by the token.
API = "api"
# Seconds between the first saves of a record, and between those of a long stage: what a killed process loses at most.
_FIRST_INTERVAL, _LONGEST_INTERVAL = 2.0, 20.0


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What things cost, in one currency of the reader's choice.

    Attributes:
        gpu_hour: an hour of one device; for a stage on the CPU, of one core.
        million_prompt_tokens: a million tokens sent to an API.
        million_completion_tokens: a million tokens that an API generated.
    """

    gpu_hour: float = 0.0
    million_prompt_tokens: float = 0.0
    million_completion_tokens: float = 0.0

    def __post_init__(self) -> None:
        for name, price in asdict(self).items():
            if not 0 <= price < math.inf:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} is {price}; expected a price of 0 or more")


@dataclass(frozen=True, kw_only=True)
class CostRecord:
    """What one run of one stage cost.

    Attributes:
        method: the method that the stage belongs to: activation, gradient, judge, ...
        stage: extract, behavior, score, warm-up, ...
        wall_seconds: from beginning to end.
        device_seconds: CUDA: the time for which devices were held, wall times devices. CPU: CPU seconds of the
            process and of its children that have ended, over all cores. API: 0.
        device: "cpu", "cuda:0", "api", ...
        devices: how many were held.
        model_tokens: tokens that went through a model here.
        flops: of these tokens, by the formulas of `engine.flops`; a backward pass counts as two forward passes, through
            frozen weights as one.
        peak_memory_bytes: CUDA: most memory allocated during the stage, on its device. CPU: largest resident size of
            the process so far, whichever stage needed it. 0 where the system does not say, or for an API.
        api_prompt_tokens, api_completion_tokens: as billed by an API.
        extra: further figures of this stage, plain JSON values.
    """

    method: str
    stage: str
    wall_seconds: float
    device_seconds: float
    device: str
    devices: int
    model_tokens: int
    flops: float
    peak_memory_bytes: int
    api_prompt_tokens: int = 0
    api_completion_tokens: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def money(self, prices: Prices) -> float:
        """Device hours and API tokens at these prices."""
        return (
            self.device_seconds / 3600 * prices.gpu_hour
            + self.api_prompt_tokens / 1e6 * prices.million_prompt_tokens
            + self.api_completion_tokens / 1e6 * prices.million_completion_tokens
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)


class CostMeter:
    """Measures a `with` block, an interrupted one as well, if it had counted anything by then.

    Args:
        method, stage, device, devices: as in `CostRecord`; "auto" stands for the device that "auto" would choose.
        path: costs file that gets the record: at the first `add`, at later ones when 2 seconds have gone by since (then
            4, 8, 16, and 20 from there on), and when the block ends; None writes nothing.
        resumed: keep the records that the file has of this stage, because this run goes on with their product. Else
            they are replaced. Records of other stages always stay.

    Attributes:
        record: the cost so far; after the block, of the block.
        extra: becomes `CostRecord.extra`.

    Raises:
        ConfigError: the device is not there, or the costs file cannot be written.
        DataFormatError: the costs file is damaged.
    """

    def __init__(
        self,
        *,
        method: str,
        stage: str,
        device: torch.device | str,
        devices: int = 1,
        path: str | Path | None = None,
        resumed: bool = False,
    ) -> None:
        self.method = method
        self.stage = stage
        self.extra: dict[str, Any] = {}
        self._device = _device_name(device)
        self._devices = 0 if self._device == API else devices
        self._path = path
        self._resumed = resumed
        self._tokens = self._prompt_tokens = self._completion_tokens = 0
        self._flops = 0.0
        self._workers: dict[str, CostRecord] = {}
        self._earlier: list[CostRecord] = []
        self._ended: CostRecord | None = None

    def __enter__(self) -> CostMeter:
        if self._path is not None and Path(self._path).exists():
            stage = (self.method, self.stage)
            self._earlier = [
                record for record in read_costs(self._path) if self._resumed or (record.method, record.stage) != stage
            ]
        if self._on_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        self._ended = None
        self._begun, self._cpu_begun = time.perf_counter(), _cpu_seconds()
        self._next_save, self._interval = self._begun, _FIRST_INTERVAL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._on_cuda and error is None:
            import torch

            torch.cuda.synchronize(self._device)
        self._ended = self.record
        if error is None:
            self._save()
        elif self._counted:
            self._save_if_possible()

    @property
    def _counted(self) -> bool:
        return any((self._tokens, self._flops, self._prompt_tokens, self._completion_tokens))

    def _save_if_possible(self) -> None:
        """Keep the record of an interrupted run; its own error is the one to report."""
        try:
            self._save()
        except ConfigError as failure:
            logger.warning("the cost of the interrupted %s is not kept: %s", self.stage, failure)

    def add(
        self, *, tokens: int = 0, flops: float = 0.0, api_prompt_tokens: int = 0, api_completion_tokens: int = 0
    ) -> None:
        """Count more tokens and operations."""
        self._tokens += tokens
        self._flops += flops
        self._prompt_tokens += api_prompt_tokens
        self._completion_tokens += api_completion_tokens
        now = time.perf_counter()
        if self._path is not None and now >= self._next_save and self._counted:
            self._next_save = now + self._interval
            self._interval = min(2 * self._interval, _LONGEST_INTERVAL)
            self._save()

    def add_worker(self, name: str, cost: CostRecord) -> None:
        """Count what a worker of a cluster has measured with a meter of its own since it was counted last.

        The record then has the workers' devices. What this process does itself counts among CPUs only: it holds none
        of the workers' other devices.
        """
        before = self._workers.get(name)
        seconds = cost.device_seconds + (before.device_seconds if before is not None else 0.0)
        self._workers[name] = replace(cost, device_seconds=seconds)
        self.add(tokens=cost.model_tokens, flops=cost.flops)

    @property
    def record(self) -> CostRecord:
        """See the class."""
        if self._ended is not None:
            return self._ended
        own = self._own_record()
        if not self._workers:
            return own
        parts = list(self._workers.values())
        if own.device in {part.device for part in parts}:
            parts.append(own)
        return replace(
            own,
            device="+".join(sorted({part.device for part in parts})),
            devices=len(self._workers),
            device_seconds=sum(part.device_seconds for part in parts),
            peak_memory_bytes=max(part.peak_memory_bytes for part in parts),
        )

    def _own_record(self) -> CostRecord:
        wall = time.perf_counter() - self._begun
        on_cpu = not self._on_cuda and self._device != API
        return CostRecord(
            method=self.method,
            stage=self.stage,
            wall_seconds=wall,
            device_seconds=_cpu_seconds() - self._cpu_begun if on_cpu else wall * self._devices,
            device=self._device,
            devices=self._devices,
            model_tokens=self._tokens,
            flops=float(self._flops),
            peak_memory_bytes=self._peak_memory(),
            api_prompt_tokens=self._prompt_tokens,
            api_completion_tokens=self._completion_tokens,
            extra=dict(self.extra),
        )

    @property
    def _on_cuda(self) -> bool:
        return self._device.startswith("cuda")

    def _peak_memory(self) -> int:
        if self._device == API:
            return 0
        if self._on_cuda:
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        return _peak_resident_bytes()

    def _save(self) -> None:
        if self._path is not None:
            write_costs(self._path, [*self._earlier, self.record])


def _device_name(device: torch.device | str) -> str:
    if not isinstance(device, str) or device in ("cpu", API):
        return str(device)
    from pairtrace.engine.checkpoint import resolve_device

    return str(resolve_device(device))


def _cpu_seconds() -> float:
    # The process's own clock is finer than the ticks in which its ended children are counted.
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _peak_resident_bytes() -> int:
    # Linux's own counter comes first: a process inherits the getrusage figure of the one that started it.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def costs_path(product: str | Path) -> Path:
    """The costs file beside a product: `scores.parquet` and `scores.costs.jsonl`. A costs file is its own."""
    path = Path(product)
    return path if path.name.endswith(SUFFIX) else path.with_name(path.stem + SUFFIX)


def write_costs(path: str | Path, records: Iterable[CostRecord]) -> None:
    """Write a costs file, in place of the one that is there.

    Raises:
        ConfigError: it cannot be written.
    """
    lines = [json.dumps(record.to_dict(), sort_keys=True) + "\n" for record in records]
    # Written now and then, and at the end of commands that take less time than a disk to say that it is safe.
    with replacing(path, durable=False) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def read_costs(path: str | Path) -> list[CostRecord]:
    """The records of a costs file, in its order.

    Raises:
        DataFormatError: there is no such file, or it is not a costs file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataFormatError(
            f"cannot read the costs file {path}: {error}; expected the {SUFFIX} file beside a store or scores file"
        ) from error
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parse(line: str, place: str) -> CostRecord:
    types: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float), "dict[str, Any]": dict}
    expected = {field.name: types[str(field.type)] for field in fields(CostRecord)}
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataFormatError(f"{place} is not JSON: {error}; it is not a costs file") from error
    if not isinstance(values, dict) or values.keys() != expected.keys():
        raise DataFormatError(f"{place} is not a cost record; expected the fields {', '.join(expected)}")
    wrong = [name for name, kind in expected.items() if not isinstance(values[name], kind)]
    if wrong:
        raise DataFormatError(f"{place} has a value of the wrong type in {', '.join(wrong)}")
    return CostRecord(**values)
