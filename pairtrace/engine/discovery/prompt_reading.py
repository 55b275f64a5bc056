"""From prompts and two checkpoints to the vectors of a bag, with what an earlier run has left in the directory."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from pairtrace.engine.base_reader import BaseReader
from pairtrace.engine.behavior import judged_rollouts
from pairtrace.engine.cost import CostMeter
from pairtrace.engine.discovery.prompt_bag import PromptBag, bag_items, bag_vectors
from pairtrace.engine.discovery.prompts_config import PromptsConfig
from pairtrace.engine.progress import Progress
from pairtrace.engine.reading import Reading
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
    reader = BaseReader.prepare(replace(config.behavior, layers=(layer,)))
    table = judged_rollouts(reader.config, reader.prints["model_fingerprint"], progress, meter, mixed=True)
    kept, identity = Path(config.out) / BAG_FILE, _identity(table, reader.reading, reader.prints)
    if kept.exists():
        bag, actual = PromptBag.load(kept)
        if actual == identity:
            logger.info("%s holds these vectors already; they are used as they are", kept)
            return bag, table
    bag = bag_vectors(table, bag_items(table), reader.renderer, reader.load(meter), progress)
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
