"""pairtrace: which preference pairs taught the model this behaviour?

    from pairtrace import BehaviorConfig, ExtractConfig, ScoreConfig, build_behavior, extract, score, top

Names are imported when they are first used, so `import pairtrace` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pairtrace.version import __version__

if TYPE_CHECKING:
    from pairtrace.engine.baselines.gradient import gradient_baseline
    from pairtrace.engine.baselines.gradient_config import GradientConfig
    from pairtrace.engine.baselines.judge import score_by_judge
    from pairtrace.engine.baselines.judge_config import JudgeConfig
    from pairtrace.engine.baselines.margin import MarginConfig, score_margin
    from pairtrace.engine.baselines.simple import LengthConfig, RandomConfig, score_length, score_random
    from pairtrace.engine.behavior import BehaviorConfig, build_behavior
    from pairtrace.engine.convert import ConvertConfig, convert
    from pairtrace.engine.cost import CostRecord, Prices, read_costs
    from pairtrace.engine.detectability.config import DetectabilityConfig
    from pairtrace.engine.detectability.measure import detectability
    from pairtrace.engine.diagnosis.config import DiagnoseConfig
    from pairtrace.engine.diagnosis.diagnose import diagnose
    from pairtrace.engine.discovery.pairs_view import PairsConfig, discover_pairs
    from pairtrace.engine.discovery.prompts_config import PromptsConfig
    from pairtrace.engine.discovery.prompts_view import discover_prompts
    from pairtrace.engine.edit import edit
    from pairtrace.engine.edit_config import EditConfig
    from pairtrace.engine.evaluation.config import EvaluateConfig
    from pairtrace.engine.evaluation.evaluate import evaluate
    from pairtrace.engine.extract import ExtractConfig, extract
    from pairtrace.engine.finetuning.config import FinetuneConfig
    from pairtrace.engine.finetuning.finetune import finetune
    from pairtrace.engine.monitoring.callback import MonitorCallback
    from pairtrace.engine.monitoring.config import MonitorConfig, MonitorRunConfig
    from pairtrace.engine.monitoring.run import monitor_run
    from pairtrace.engine.pairs import open_pairs
    from pairtrace.engine.plan import PlanConfig, plan
    from pairtrace.engine.probes.compare import ProbeCompareConfig, compare_probes
    from pairtrace.engine.probes.config import ProbeEvalConfig, ProbeTrainConfig
    from pairtrace.engine.probes.evaluate import evaluate_probes
    from pairtrace.engine.probes.hooks import reading_layers
    from pairtrace.engine.probes.probe_file import load_probes
    from pairtrace.engine.probes.term import ProbeTerm
    from pairtrace.engine.probes.train import train_probes
    from pairtrace.engine.ranking import sources, top
    from pairtrace.engine.restore import restore
    from pairtrace.engine.score import ScoreConfig, score
    from pairtrace.engine.selection import SelectionRule
    from pairtrace.engine.steering.config import SteerConfig
    from pairtrace.engine.steering.shift import ShiftConfig, measure_shift
    from pairtrace.engine.steering.steer import steer
    from pairtrace.engine.training.config import TrainConfig
    from pairtrace.engine.training.train import train
    from pairtrace.engine.truncation import TruncateConfig, truncate
    from pairtrace.engine.vllm.options import VLLMOptions
    from pairtrace.store.reader import ActivationStore
    from pairtrace.store.verify import verify

__all__ = [
    "ActivationStore",
    "BehaviorConfig",
    "ConvertConfig",
    "CostRecord",
    "DetectabilityConfig",
    "DiagnoseConfig",
    "EditConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "FinetuneConfig",
    "GradientConfig",
    "JudgeConfig",
    "LengthConfig",
    "MarginConfig",
    "MonitorCallback",
    "MonitorConfig",
    "MonitorRunConfig",
    "PairsConfig",
    "PlanConfig",
    "Prices",
    "ProbeCompareConfig",
    "ProbeEvalConfig",
    "ProbeTerm",
    "ProbeTrainConfig",
    "PromptsConfig",
    "RandomConfig",
    "ScoreConfig",
    "SelectionRule",
    "ShiftConfig",
    "SteerConfig",
    "TrainConfig",
    "TruncateConfig",
    "VLLMOptions",
    "__version__",
    "build_behavior",
    "compare_probes",
    "convert",
    "detectability",
    "diagnose",
    "discover_pairs",
    "discover_prompts",
    "edit",
    "evaluate",
    "evaluate_probes",
    "extract",
    "finetune",
    "gradient_baseline",
    "load_probes",
    "measure_shift",
    "monitor_run",
    "open_pairs",
    "plan",
    "read_costs",
    "reading_layers",
    "restore",
    "score",
    "score_by_judge",
    "score_length",
    "score_margin",
    "score_random",
    "sources",
    "steer",
    "top",
    "train",
    "train_probes",
    "truncate",
    "verify",
]

_HOMES = {
    "ActivationStore": "pairtrace.store.reader",
    "BehaviorConfig": "pairtrace.engine.behavior",
    "ConvertConfig": "pairtrace.engine.convert",
    "CostRecord": "pairtrace.engine.cost",
    "DetectabilityConfig": "pairtrace.engine.detectability.config",
    "DiagnoseConfig": "pairtrace.engine.diagnosis.config",
    "EditConfig": "pairtrace.engine.edit_config",
    "EvaluateConfig": "pairtrace.engine.evaluation.config",
    "ExtractConfig": "pairtrace.engine.extract",
    "FinetuneConfig": "pairtrace.engine.finetuning.config",
    "GradientConfig": "pairtrace.engine.baselines.gradient_config",
    "JudgeConfig": "pairtrace.engine.baselines.judge_config",
    "LengthConfig": "pairtrace.engine.baselines.simple",
    "MarginConfig": "pairtrace.engine.baselines.margin",
    "MonitorCallback": "pairtrace.engine.monitoring.callback",
    "MonitorConfig": "pairtrace.engine.monitoring.config",
    "MonitorRunConfig": "pairtrace.engine.monitoring.config",
    "PairsConfig": "pairtrace.engine.discovery.pairs_view",
    "PlanConfig": "pairtrace.engine.plan",
    "Prices": "pairtrace.engine.cost",
    "ProbeCompareConfig": "pairtrace.engine.probes.compare",
    "ProbeEvalConfig": "pairtrace.engine.probes.config",
    "ProbeTerm": "pairtrace.engine.probes.term",
    "ProbeTrainConfig": "pairtrace.engine.probes.config",
    "PromptsConfig": "pairtrace.engine.discovery.prompts_config",
    "RandomConfig": "pairtrace.engine.baselines.simple",
    "ScoreConfig": "pairtrace.engine.score",
    "SelectionRule": "pairtrace.engine.selection",
    "ShiftConfig": "pairtrace.engine.steering.shift",
    "SteerConfig": "pairtrace.engine.steering.config",
    "TrainConfig": "pairtrace.engine.training.config",
    "TruncateConfig": "pairtrace.engine.truncation",
    "VLLMOptions": "pairtrace.engine.vllm.options",
    "build_behavior": "pairtrace.engine.behavior",
    "compare_probes": "pairtrace.engine.probes.compare",
    "convert": "pairtrace.engine.convert",
    "detectability": "pairtrace.engine.detectability.measure",
    "diagnose": "pairtrace.engine.diagnosis.diagnose",
    "discover_pairs": "pairtrace.engine.discovery.pairs_view",
    "discover_prompts": "pairtrace.engine.discovery.prompts_view",
    "edit": "pairtrace.engine.edit",
    "evaluate": "pairtrace.engine.evaluation.evaluate",
    "evaluate_probes": "pairtrace.engine.probes.evaluate",
    "extract": "pairtrace.engine.extract",
    "finetune": "pairtrace.engine.finetuning.finetune",
    "gradient_baseline": "pairtrace.engine.baselines.gradient",
    "load_probes": "pairtrace.engine.probes.probe_file",
    "measure_shift": "pairtrace.engine.steering.shift",
    "monitor_run": "pairtrace.engine.monitoring.run",
    "open_pairs": "pairtrace.engine.pairs",
    "plan": "pairtrace.engine.plan",
    "read_costs": "pairtrace.engine.cost",
    "reading_layers": "pairtrace.engine.probes.hooks",
    "restore": "pairtrace.engine.restore",
    "score": "pairtrace.engine.score",
    "score_by_judge": "pairtrace.engine.baselines.judge",
    "score_length": "pairtrace.engine.baselines.simple",
    "score_margin": "pairtrace.engine.baselines.margin",
    "score_random": "pairtrace.engine.baselines.simple",
    "sources": "pairtrace.engine.ranking",
    "steer": "pairtrace.engine.steering.steer",
    "top": "pairtrace.engine.ranking",
    "train": "pairtrace.engine.training.train",
    "train_probes": "pairtrace.engine.probes.train",
    "truncate": "pairtrace.engine.truncation",
    "verify": "pairtrace.store.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pairtrace' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
