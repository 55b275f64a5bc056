"""Watching a run by its checkpoints, finished or under way."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pairtrace.engine.cost import CostMeter
from pairtrace.engine.monitoring.checkpoints import arriving, load_checkpoint, require_checkpoints
from pairtrace.engine.monitoring.config import MonitorRunConfig
from pairtrace.engine.monitoring.monitor import LOG, PLOT, Monitor, free_memory
from pairtrace.engine.progress import NULL_PROGRESS, Progress

logger = logging.getLogger(__name__)

COSTS = "monitor.costs.jsonl"


@dataclass(frozen=True, kw_only=True)
class MonitorSummary:
    """What a monitor has seen.

    Attributes:
        log, plot: files.
        steps: that the log has.
        looked_at: steps that were asked just now.
        items: prompts under their conditions.
        clusters: shares at the last step: name, kind, flagged, answers, share, and the upper end of M0's interval.
        alerts: of all steps: step, severity, cluster, text.
        stopped: the watch ended at an alert.
    """

    log: str
    plot: str
    steps: tuple[int, ...]
    looked_at: int
    items: int
    clusters: tuple[dict[str, Any], ...]
    alerts: tuple[dict[str, Any], ...]
    stopped: bool

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def monitor_run(config: MonitorRunConfig, progress: Progress = NULL_PROGRESS) -> MonitorSummary:
    """Ask the checkpoints of a run one after the other, going on after those that the log has.

    Raises:
        DataError: the prompts or the known clusters cannot be used, or the log is another run's.
        ConfigError: an option cannot be used, or there is no checkpoint.
        ModelError: M0 or a checkpoint cannot be used.
        StoreLockedError: another monitor writes to the directory.
    """
    require_checkpoints(config)
    out = Path(config.out)
    looked_at, stopped = 0, False
    meter = CostMeter(method="monitor", stage="monitor", device=config.device, path=out / COSTS, resumed=True)
    with meter, Monitor(config, progress=progress, meter=meter) as monitor:
        for step, path in arriving(config, monitor.last_step):
            sampler = load_checkpoint(path, config, monitor.encoder, monitor.numerics)
            if sampler is None:
                continue
            seen = monitor.observe(step, sampler)
            del sampler
            free_memory(monitor.numerics.device)
            looked_at += 1
            if seen.alerts and config.on_alert == "stop":
                stopped = True
                break
        last = monitor.logged.get(monitor.last_step, {})
        return MonitorSummary(
            log=str(out / LOG),
            plot=str(out / PLOT),
            steps=tuple(monitor.logged),
            looked_at=looked_at,
            items=monitor.items,
            clusters=tuple(_row(line) for line in last.get("clusters", ())),
            alerts=tuple(monitor.alerts),
            stopped=stopped,
        )


def _row(line: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: line[name] for name in ("name", "kind", "flagged")},
        "answers": line["now"]["count"],
        "share": line["now"]["share"],
        "m0_at_most": line["start"]["interval"][1],
    }
