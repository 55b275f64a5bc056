"""From prompts and two checkpoints to the vectors of a bag, with what an earlier run has left in the directory."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from pairtrace.engine.behavior import judged_rollouts
from pairtrace.engine.cost import CostMeter
from pairtrace.engine.discovery.prompt_bag import PromptBag, bag_items, bag_vectors
from pairtrace.engine.discovery.prompts_config import PromptsConfig
from pairtrace.engine.progress import Progress
from pairtrace.engine.reading import Reading, choose_reading, fitting_store
from pairtrace.engine.rollout_table import RolloutTable
from pairtrace.engine.row_digest import RowDigest

logger = logging.getLogger(__name__)

BAG_FILE = "prompts.vectors.safetensors"


def read_bag(config: PromptsConfig, layer: int, meter: CostMeter, progress: Progress) -> tuple[PromptBag, RolloutTable]:
    """Sample or read the rollouts, judge them, and read their vectors as the store was read; both are kept in `out`.

    Args:
        config: of the discovery.
        layer: of the store.
        meter: counts tokens and operations.
        progress: receives the stages.

    Returns:
        The vectors, for one layer, and the rollouts with their verdicts.

    Raises:
        As `discover_prompts`.
    """
    from pairtrace.engine.architectures import check_layers, family_of
    from pairtrace.engine.backend import HFBackend
    from pairtrace.engine.checkpoint import load_config, model_fingerprint, resolve_device
    from pairtrace.engine.prompt_encoder import PromptEncoder
    from pairtrace.engine.rendering import Renderer

    encoder = PromptEncoder.load(config.base, chat_template=config.chat_template, template_date=config.template_date)
    prints = {
        "model_fingerprint": model_fingerprint(config.base),
        **{name: str(encoder.identity[name]) for name in ("tokenizer_fingerprint", "template_fingerprint")},
    }
    model_config = load_config(config.base)
    behavior = replace(config.behavior, layers=(layer,))
    reading = choose_reading(behavior, fitting_store(config.store, prints), int(model_config.num_hidden_layers))
    # Whatever could stop the reading is found before the sampling, which takes hours.
    check_layers(reading.layers, model_config)
    family_of(model_config, reading.max_length)
    resolve_device(config.device)
    table = judged_rollouts(behavior, prints["model_fingerprint"], progress, meter)
    kept, identity = Path(config.out) / BAG_FILE, _identity(table, reading, prints)
    if kept.exists():
        bag, actual = PromptBag.load(kept)
        if actual == identity:
            logger.info("%s holds these vectors already; they are used as they are", kept)
            return bag, table
    renderer = Renderer(
        encoder.tokenizer,
        max_length=reading.max_length,
        truncation=reading.truncation,
        chat_template=encoder.chat_template,
    )
    backend = HFBackend.load(
        config.base,
        reading.layers,
        device=config.device,
        dtype=reading.dtype,
        max_length=reading.max_length,
        token_budget=config.token_budget,
        fingerprint=prints["model_fingerprint"],
        meter=meter,
    )
    bag = bag_vectors(table, bag_items(table), renderer, backend, progress)
    bag.save(kept, identity)
    return bag, table


def _identity(table: RolloutTable, reading: Reading, prints: dict[str, str]) -> dict[str, Any]:
    """What decides the vectors of a bag, as plain JSON values; verdicts do not."""
    answers = table.table.select(["prompt_id", "condition", "model", "messages", "response"])
    digest = RowDigest(answers.schema)
    for batch in answers.to_batches():
        digest.update(batch)
    settings = {name: getattr(reading, name) for name in ("max_length", "truncation", "dtype")}
    return {**prints, **settings, "layers": list(reading.layers), "answers": digest.hexdigest()}
