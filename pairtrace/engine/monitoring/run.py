"""Watching a run by its checkpoints, finished or under way."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pairtrace.engine.cost import CostMeter
from pairtrace.engine.monitoring.checkpoints import (
    arriving,
    checkpoint_fingerprint,
    checkpoints_of,
    load_checkpoint,
    require_checkpoints,
)
from pairtrace.engine.monitoring.config import MonitorRunConfig
from pairtrace.engine.monitoring.monitor import LOG, PLOT, Monitor, free_memory
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import DataMismatchError, ModelError

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
        unreadable: answers of the last step that could not be read, by reason.
        alerts: of all steps: step, severity, cluster, text.
        stopped: the watch ended at an alert.
    """

    log: str
    plot: str
    steps: tuple[int, ...]
    looked_at: int
    items: int
    clusters: tuple[dict[str, Any], ...]
    unreadable: dict[str, int]
    alerts: tuple[dict[str, Any], ...]
    stopped: bool

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def monitor_run(config: MonitorRunConfig, progress: Progress = NULL_PROGRESS) -> MonitorSummary:
    """Ask the checkpoints of a run one after the other, going on after those that the log has.

    Raises:
        DataError: the prompts or the known clusters cannot be used, or the log is another run's: of other settings,
            or of other weights than those of a checkpoint that is there.
        ConfigError: an option cannot be used, or there is no checkpoint.
        ModelError: M0 or a checkpoint cannot be used, or no checkpoint can be read.
        StoreLockedError: another monitor writes to the directory.
    """
    require_checkpoints(config)
    out = Path(config.out)
    looked_at = 0
    meter = CostMeter(method="monitor", stage="monitor", device=config.device, path=out / COSTS, resumed=True)
    with meter, Monitor(config, progress=progress, meter=meter) as monitor:
        # A run that has stopped at an alert stays so, however often it is started.
        stopped = config.on_alert == "stop" and bool(monitor.alerts)
        there = checkpoints_of(Path(config.run)).items()
        for step, path in there if stopped else arriving(config, monitor.last_step):
            if step > monitor.last_step and stopped:
                break
            if step <= monitor.last_step:
                _require_logged(monitor, step, path)
                continue
            sampler = load_checkpoint(path, config, monitor.encoder, monitor.numerics)
            if sampler is None:
                continue
            seen = monitor.observe(step, sampler, checkpoint_fingerprint(path))
            del sampler
            free_memory(monitor.numerics.device)
            looked_at += 1
            if seen.alerts and config.on_alert == "stop":
                stopped = True
                break
        if not monitor.logged and not config.follow:
            raise ModelError(f"no checkpoint in {config.run} can be read; the notes above say why")
        last = monitor.logged.get(monitor.last_step, {})
        return MonitorSummary(
            log=str(out / LOG),
            plot=str(out / PLOT),
            steps=tuple(monitor.logged),
            looked_at=looked_at,
            items=monitor.items,
            clusters=tuple(_row(line) for line in last.get("clusters", ())),
            unreadable=last.get("unreadable", {}),
            alerts=tuple(monitor.alerts),
            stopped=stopped,
        )


def _require_logged(monitor: Monitor, step: int, path: Path) -> None:
    """A training that is repeated into the same directory must not take the log of the one before for its own."""
    log = Path(monitor.config.out) / LOG
    advice = f"give another --out, or remove {monitor.config.out} to begin again"
    if step not in monitor.logged:
        raise DataMismatchError(
            f"{log} has step {monitor.last_step} but not step {step}, and {path} is there: the log is another run's, "
            f"has lost a line, or the checkpoint came late; {advice}"
        )
    expected, actual = monitor.logged[step].get("checkpoint"), checkpoint_fingerprint(path)
    if actual is None or actual == expected:
        return
    if expected is None:
        raise DataMismatchError(
            f"{log} does not say which weights it saw at step {step} (it was written inside a training, or by an "
            f"earlier pairtrace), so that {path} may be another run's; {advice}"
        )
    raise DataMismatchError(
        f"{log} saw weights with fingerprint {expected[:12]} at step {step}, but {path} has {actual[:12]}: the log is "
        f"another run's; {advice}"
    )


def _row(line: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: line[name] for name in ("name", "kind", "flagged")},
        "answers": line["now"]["count"],
        "share": line["now"]["share"],
        "m0_at_most": line["start"]["interval"][1],
    }
