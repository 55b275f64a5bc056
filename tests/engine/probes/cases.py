"""Small probes, and examples whose classes are known, for the tests of probes."""

from __future__ import annotations

from typing import Any

import numpy as np

from pairtrace.engine.probes.probe_file import Probe

PRINTS = {"model_fingerprint": "1" * 64, "tokenizer_fingerprint": "2" * 64, "template_fingerprint": "3" * 64}


def make_probe(*, members: int = 1, width: int = 32, layer: int = 2, seed: int = 0, **changed: Any) -> Probe:
    rng = np.random.default_rng(seed)
    given: dict[str, Any] = {
        "name": "harm",
        "layer": layer,
        "role": "training",
        "weight": rng.normal(size=(members, width)).astype(np.float32),
        "bias": rng.normal(size=members),
        **PRINTS,
    }
    return Probe(**{**given, **changed})
