"""Capability tasks through the package lm-eval (EleutherAI's evaluation harness), an extra."""

from __future__ import annotations

import importlib
from typing import Any

from pairtrace.engine.checkpoint import resolve_checkpoint, resolve_device
from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.parts import Part
from pairtrace.errors import ConfigError, MissingDependencyError

Scores = dict[str, dict[str, dict[str, float | None]]]
"""By task and metric: `value` and `stderr` (None where lm-eval gives none)."""


def load_lm_eval() -> Any:
    """The package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module("lm_eval")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise MissingDependencyError("lm-eval[hf]", "lm-eval", "--lm-eval") from error


def capability_scores(config: EvaluateConfig, model: str, part: Part) -> Scores:
    """The tasks' scores of one checkpoint, by `lm_eval.simple_evaluate`; tasks that `part` holds are not run again.

    lm-eval loads the checkpoint itself, without code of its own, with the chat template when there is one.

    Raises:
        ConfigError: lm-eval refuses a task.
        MissingDependencyError: the package is not installed.
    """
    scores: Scores = {name: task for entry in part.entries for name, task in entry["scores"].items()}
    finished = {name for entry in part.entries for name in entry["tasks"]}
    for name in config.lm_eval:
        if name in finished:
            continue
        new = _run(config, model, name)
        part.append([{"tasks": [name], "scores": new}])
        scores |= new
    return scores


def _run(config: EvaluateConfig, model: str, task: str) -> Scores:
    lm_eval = load_lm_eval()
    arguments = {
        "pretrained": str(resolve_checkpoint(model)),
        "dtype": config.dtype,
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    try:
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=[task],
            batch_size=config.batch_size,
            device=str(resolve_device(config.device)),
            limit=config.lm_eval_limit,
            apply_chat_template=True,
            log_samples=False,
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(f"lm-eval cannot run {task!r} on {model}: {error}; see `lm_eval ls tasks`") from error
    return {str(name): _metrics(values) for name, values in results["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Out of keys such as "acc,none" and "acc_stderr,none"."""
    metrics = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not isinstance(value, int | float) or isinstance(value, bool) or name.endswith("_stderr"):
            continue
        if not filtered:
            continue
        error = values.get(f"{name}_stderr,{filtered}")
        metrics[key] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
    return metrics
