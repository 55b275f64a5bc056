"""pairtrace: which preference pairs taught the model this behaviour?

    from pairtrace import BehaviorConfig, ExtractConfig, ScoreConfig, build_behavior, extract, score, top

Names are imported when they are first used, so `import pairtrace` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pairtrace.version import __version__

if TYPE_CHECKING:
    from pairtrace.engine.behavior import BehaviorConfig, build_behavior
    from pairtrace.engine.convert import ConvertConfig, convert
    from pairtrace.engine.diagnosis.config import DiagnoseConfig
    from pairtrace.engine.diagnosis.diagnose import diagnose
    from pairtrace.engine.evaluation.config import EvaluateConfig
    from pairtrace.engine.evaluation.evaluate import evaluate
    from pairtrace.engine.extract import ExtractConfig, extract
    from pairtrace.engine.pairs import open_pairs
    from pairtrace.engine.plan import PlanConfig, plan
    from pairtrace.engine.ranking import sources, top
    from pairtrace.engine.score import ScoreConfig, score
    from pairtrace.engine.training.config import TrainConfig
    from pairtrace.engine.training.train import train
    from pairtrace.store.reader import ActivationStore
    from pairtrace.store.verify import verify

__all__ = [
    "ActivationStore",
    "BehaviorConfig",
    "ConvertConfig",
    "DiagnoseConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "PlanConfig",
    "ScoreConfig",
    "TrainConfig",
    "__version__",
    "build_behavior",
    "convert",
    "diagnose",
    "evaluate",
    "extract",
    "open_pairs",
    "plan",
    "score",
    "sources",
    "top",
    "train",
    "verify",
]

_HOMES = {
    "ActivationStore": "pairtrace.store.reader",
    "BehaviorConfig": "pairtrace.engine.behavior",
    "ConvertConfig": "pairtrace.engine.convert",
    "DiagnoseConfig": "pairtrace.engine.diagnosis.config",
    "EvaluateConfig": "pairtrace.engine.evaluation.config",
    "ExtractConfig": "pairtrace.engine.extract",
    "PlanConfig": "pairtrace.engine.plan",
    "ScoreConfig": "pairtrace.engine.score",
    "TrainConfig": "pairtrace.engine.training.config",
    "build_behavior": "pairtrace.engine.behavior",
    "convert": "pairtrace.engine.convert",
    "diagnose": "pairtrace.engine.diagnosis.diagnose",
    "evaluate": "pairtrace.engine.evaluation.evaluate",
    "extract": "pairtrace.engine.extract",
    "open_pairs": "pairtrace.engine.pairs",
    "plan": "pairtrace.engine.plan",
    "score": "pairtrace.engine.score",
    "sources": "pairtrace.engine.ranking",
    "top": "pairtrace.engine.ranking",
    "train": "pairtrace.engine.training.train",
    "verify": "pairtrace.store.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pairtrace' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
