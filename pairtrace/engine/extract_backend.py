"""Which back end computes the rows of a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pairtrace.engine.cost import CostMeter
from pairtrace.engine.extract import ExtractConfig
from pairtrace.engine.progress import Progress
from pairtrace.store.manifest import Manifest

if TYPE_CHECKING:
    from pairtrace.engine.backend import HFBackend
    from pairtrace.engine.vllm.backend import VLLMBackend


@contextmanager
def loaded_backend(
    config: ExtractConfig, manifest: Manifest, meter: CostMeter, progress: Progress
) -> Iterator[HFBackend | VLLMBackend]:
    """Lends the back end that the settings name; behind it, its engine has ended.

    Raises:
        ModelError, ConfigError, MissingDependencyError, EngineError: it cannot be loaded.
    """
    settings: dict[str, Any] = {
        "device": config.device,
        "dtype": config.compute_dtype,
        "max_length": config.max_length,
        "token_budget": config.token_budget,
        "fingerprint": manifest.model_fingerprint,
        "meter": meter,
    }
    if config.backend == "hf":
        from pairtrace.engine.backend import HFBackend

        yield HFBackend.load(config.model, manifest.layers, **settings)
        return
    from pairtrace.engine.vllm.backend import VLLMBackend

    settings |= {"store_dtype": manifest.dtype, "sides": manifest.sides, "options": config.vllm, "progress": progress}
    with VLLMBackend.load(config.model, manifest.layers, **settings) as backend:
        yield backend
