"""The monitor as a callback of transformers' trainers, TRL's among them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pairtrace.engine.monitoring.config import MonitorConfig
from pairtrace.engine.monitoring.live_model import same_random_state, shared_view
from pairtrace.engine.monitoring.monitor import LOG, Monitor, Numerics
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.sampling import Sampler
from pairtrace.errors import ConfigError, DataMismatchError

logger = logging.getLogger(__name__)


class MonitorCallback(TrainerCallback):
    """Asks the model in training every few steps; training goes on as if it had not been asked, to the bit.

        trainer = DPOTrainer(..., callbacks=[MonitorCallback(MonitorConfig(base=..., prompts=..., out=...), steps=50)])

    The answers come from the weights in memory, nothing is saved. M0 is loaded beside the model in training to read
    them. A run that is resumed does not repeat what its log has, and one that begins at step 0 needs a log of its own.

    Args:
        config: the settings; its device and dtype are those of reading, answers come as the trainer computes.
        steps: optimizer steps between two looks; the last step is looked at in any case.
        progress: receives the stages.

    Attributes:
        stopped: the step at which an alert stopped training; None otherwise.
        alerts: all so far, with their steps.

    Raises:
        ConfigError: `steps` is below 1; when training begins, it runs in several processes.
        DataMismatchError: when training begins at step 0, the log has steps of an earlier run.
    """

    def __init__(self, config: MonitorConfig, *, steps: int, progress: Progress = NULL_PROGRESS) -> None:
        if steps < 1:
            raise ConfigError(f"the steps between two looks are {steps}; expected at least 1")
        self.stopped: int | None = None
        self.alerts: list[dict[str, Any]] = []
        self._config = config
        self._steps = steps
        self._progress = progress
        self._monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Load M0, and let it answer where that was not done before."""
        if args.world_size > 1:
            raise ConfigError(
                f"training runs in {args.world_size} processes, and the callback watches a model in one; save "
                "checkpoints and run `pairtrace monitor --follow` on their directory"
            )
        self._close()
        parameter = next(model.parameters())
        numerics = Numerics(
            device=parameter.device,
            dtype=str(parameter.dtype).removeprefix("torch."),
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        )
        with same_random_state():
            monitor = Monitor(self._config, numerics=numerics, progress=self._progress)
            self._monitor = monitor.__enter__()
        if state.global_step == 0 and monitor.logged:
            self._close()
            raise DataMismatchError(
                f"training begins at step 0, but {Path(self._config.out) / LOG} has an earlier run's steps "
                f"{min(monitor.logged)} to {monitor.last_step}; remove {self._config.out}, or log to another directory"
            )
        self.alerts = monitor.alerts

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        """Look at the model after every `steps` steps."""
        if state.global_step % self._steps == 0:
            self._look(state.global_step, model)
            if self.stopped is not None:
                control.should_training_stop = True
                control.should_save = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Look at the model as it is in the end."""
        self._look(state.global_step, model)
        self._close()

    def _look(self, step: int, model: Any) -> None:
        assert self._monitor is not None, "on_train_begin comes first"
        if step <= self._monitor.last_step:
            return
        with same_random_state():
            seen = self._monitor.observe(step, Sampler(shared_view(model), self._monitor.encoder))
        self.alerts = self._monitor.alerts
        if seen.alerts and self._config.on_alert == "stop":
            self.stopped = step

    def _close(self) -> None:
        if self._monitor is not None:
            self._monitor.__exit__()
            self._monitor = None
