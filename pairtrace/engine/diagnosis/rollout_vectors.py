"""One behaviour-change vector per rollout pair, for the bootstrap over rollouts.

Direction files keep means only, so the rollout pairs are read through the base model again, as `behavior` did.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pairtrace.engine.directions import read_manifest
from pairtrace.engine.progress import Progress
from pairtrace.errors import DataFormatError, DataMismatchError, DirectionError


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutVectors:
    """Behaviour-change vectors of single rollout pairs.

    Attributes:
        vectors: float32 [P, D].
        scenarios: int64 [P], number of the prompt of each, every number from 0 on used.
    """

    vectors: np.ndarray
    scenarios: np.ndarray


def rollout_vectors(
    rollouts: str, directions: str, layer: int, base: str | None, device: str, progress: Progress
) -> RolloutVectors:
    """Read the rollout pairs of a behaviour.

    Args:
        rollouts: judged rollouts of the behaviour.
        directions: its direction file, whose manifest says how it was read.
        layer: residual layer.
        base: the base model; None for the recorded one.
        device: of the forward passes.
        progress: counts rollout pairs.

    Raises:
        DirectionError: the direction file does not say how it was made.
        DataMismatchError: the base model is another one, or the rollouts are not those of the direction.
        DataError: the rollouts cannot be used.
        ModelError: the base model cannot be loaded.
    """
    from pairtrace.engine.backend import HFBackend
    from pairtrace.engine.change_vectors import change_vectors
    from pairtrace.engine.checkpoint import model_fingerprint
    from pairtrace.engine.prompt_encoder import PromptEncoder
    from pairtrace.engine.rendering import Renderer
    from pairtrace.engine.rollout_file import read_rollouts
    from pairtrace.engine.scenarios import filter_scenarios, require_scenarios

    manifest = read_manifest(directions)
    config, reading = manifest.get("config"), manifest.get("reading")
    if not isinstance(config, dict) or not isinstance(reading, dict):
        raise DirectionError(
            f"{directions} does not say how it was made, so its rollouts cannot be read the same way; build it with "
            "pairtrace behavior"
        )
    model = base or str(config.get("base"))
    table = read_rollouts(rollouts)
    if not table.has_verdicts:
        raise DataFormatError(f"{rollouts} holds no verdicts; give the rollouts file that pairtrace behavior wrote")
    fingerprint = model_fingerprint(model)
    if fingerprint != manifest.get("model_fingerprint"):
        raise DataMismatchError(
            f"{model} has fingerprint {fingerprint}, but {directions} was made with "
            f"{manifest.get('model_fingerprint')}; say where that base model is with --base"
        )
    filtered = filter_scenarios(table, float(config.get("max_base_rate", 0.0)))
    require_scenarios(filtered)
    _require_same_prompts(rollouts, directions, manifest, set(filtered.kept))
    encoder = PromptEncoder.load(
        model, chat_template=config.get("chat_template"), template_date=config.get("template_date")
    )
    renderer = Renderer(
        encoder.tokenizer,
        max_length=reading.get("max_length"),
        truncation=str(reading.get("truncation")),
        chat_template=encoder.chat_template,
    )
    backend = HFBackend.load(
        model,
        (layer,),
        device=device,
        dtype=str(reading.get("dtype")),
        max_length=reading.get("max_length"),
        token_budget=config.get("token_budget"),
        fingerprint=fingerprint,
    )
    # Every pair stands for a scenario of its own, so that the means are those of single pairs.
    single = [replace(pair, prompt_id=str(number)) for number, pair in enumerate(filtered.pairs)]
    found = change_vectors(table, single, renderer, backend, progress)
    names = [filtered.pairs[int(number)].prompt_id for number in found.scenarios]
    return RolloutVectors(
        vectors=np.ascontiguousarray(found.bank[:, 0]), scenarios=np.unique(names, return_inverse=True)[1]
    )


def _require_same_prompts(rollouts: str, directions: str, manifest: dict[str, Any], kept: set[str]) -> None:
    used = set(manifest.get("scenarios", []))
    if not used <= kept:
        missing = sorted(used - kept)
        raise DataMismatchError(
            f"{rollouts} is not what {directions} was made from: {len(missing)} of its {len(used)} prompts do not pass "
            f"the filter there, for example {missing[0]!r}; give the rollouts file that lies beside the direction file"
        )
