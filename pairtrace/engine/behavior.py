"""The behaviour stage: prompts and two checkpoints become directions in the residual stream.

rollouts -> verdicts -> four-condition filter -> rollout pairs -> `v_b = mean(p, r1; M0) - mean(p, r0; M0)` per pair,
where r1 shows the behaviour, r0 is safe, and both are read through the base model M0 (arXiv 2602.11079).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pairtrace.engine.change_vectors import ChangeVectors, change_vectors
from pairtrace.engine.directions import Direction, save_directions
from pairtrace.engine.judge import load_rules
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.prompts import load_prompts
from pairtrace.engine.rollout_table import RolloutTable, read_rollouts
from pairtrace.engine.rollouts import RolloutConfig, sample_rollouts
from pairtrace.engine.scenarios import Cell, Filtered, filter_scenarios, require_scenarios
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ConfigError, DataMismatchError, LayerError, StoreMismatchError

if TYPE_CHECKING:
    from pairtrace.store.manifest import Manifest

Kinds = Literal["mean", "bank", "both"]


@dataclass(frozen=True, kw_only=True)
class BehaviorConfig:
    """What `build_behavior` does.

    Attributes:
        out: direction file to write (.safetensors); the rollouts are kept beside it as `{stem}.rollouts.parquet`.
        base: M0, the checkpoint from before preference training: a directory or a hub id.
        tuned: M1, the checkpoint after it; not needed with `rollouts`.
        prompts: prompt file; not needed with `rollouts` that carry their prompts.
        name: of the behaviour; None takes the stem of `out`. A bank is called `{name}-bank`.
        rollouts: existing rollouts to start from instead of sampling.
        label_column: column of `rollouts` with the verdicts.
        rules: rule file of the judge; None for the refusal rules (or the verdicts that `rollouts` brings).
        kinds: "mean" (mean over all rollout pairs), "bank" (one mean per scenario), or "both".
        layers: residual layers; None takes those of `store`, or all from 1 on.
        store: activation store that the directions are meant for: its layers, max_length and truncation are
            used, and the model, tokenizer and template must be the same.
        max_base_rate: see `filter_scenarios`.
        temperature, samples, max_new_tokens, batch_size, seed: see `RolloutConfig`.
        device, dtype: of the forward passes.
        max_length, truncation, token_budget: as for extraction.
        chat_template: file with a Jinja chat template that replaces the tokenizers' own.
    """

    out: str
    base: str
    tuned: str | None = None
    prompts: str | None = None
    name: str | None = None
    rollouts: str | None = None
    label_column: str | None = None
    rules: str | None = None
    kinds: Kinds = "both"
    layers: tuple[int, ...] | None = None
    store: str | None = None
    max_base_rate: float = 0.0
    temperature: float = 0.7
    samples: int = 8
    max_new_tokens: int = 256
    batch_size: int = 32
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    max_length: int | None = 1024
    truncation: str = "keep_start"
    token_budget: int | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if not self.out.endswith(".safetensors"):
            raise ConfigError(f"out is {self.out!r}; direction files end in .safetensors")
        if self.kinds not in ("mean", "bank", "both"):
            raise ConfigError(f"kinds is {self.kinds!r}; expected mean, bank or both")
        if not 0 <= self.max_base_rate <= 1:
            raise ConfigError(f"max_base_rate is {self.max_base_rate}; expected a share from 0 to 1")
        if self.layers is not None and not self.layers:
            raise ConfigError("no layer was given; expected at least one, or none at all for the default")
        if self.rollouts is None and (self.prompts is None or self.tuned is None):
            raise ConfigError("sampling needs a prompt file and --tuned; or give existing rollouts")
        if self.rollouts is None and self.label_column is not None:
            raise ConfigError("label_column names a column of existing rollouts, but none were given")
        if self.label_column is not None and self.rules is not None:
            raise ConfigError("give either label_column or rules: a verdict has one judge")
        assert self.direction_name  # an unusable name is found before hours of sampling

    @property
    def direction_name(self) -> str:
        """The behaviour's name.

        Raises:
            DirectionError: it cannot name a behaviour.
        """
        name = self.name if self.name is not None else Path(self.out).stem
        probe = np.ones((1, 1), np.float32)
        return Direction(name=name, layer=None, values=probe, kind="vector", origin=self.out).name

    @property
    def rollouts_out(self) -> str:
        """Where the rollouts and verdicts are kept."""
        return str(Path(self.out).with_suffix(".rollouts.parquet"))


@dataclass(frozen=True, kw_only=True)
class BehaviorSummary:
    """What `build_behavior` made.

    Attributes:
        out: the direction file.
        rollouts: the rollouts file.
        name: of the behaviour.
        directions: names in the file.
        layers: in the file.
        width: D.
        judge: whose verdicts were used.
        missing_verdicts: rollouts without a verdict.
        scenarios: prompts that went in.
        kept: scenarios in the vector.
        dropped: scenarios that were filtered out, by reason.
        rollout_pairs: pairs in the vector.
        unusable: rollout pairs that were left out, by reason.
        cells: rates per model and condition.
        seconds: wall time.
    """

    out: str
    rollouts: str
    name: str
    directions: tuple[str, ...]
    layers: tuple[int, ...]
    width: int
    judge: str
    missing_verdicts: int
    scenarios: int
    kept: int
    dropped: dict[str, int]
    rollout_pairs: int
    unusable: dict[str, int]
    cells: tuple[Cell, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def build_behavior(config: BehaviorConfig, progress: Progress = NULL_PROGRESS) -> BehaviorSummary:
    """Build the directions of one behaviour.

    Raises:
        DataError: prompts or rollouts cannot be used, or no scenario passes the filter.
        ConfigError, ModelError, LayerError: an option or a checkpoint cannot be used.
        StoreMismatchError: `store` was made with another model, tokenizer or template.
    """
    from pairtrace.engine.backend import HFBackend
    from pairtrace.engine.checkpoint import load_config, load_tokenizer, model_fingerprint, read_chat_template
    from pairtrace.engine.fingerprints import fingerprints
    from pairtrace.engine.rendering import Renderer

    begun = time.perf_counter()
    fingerprint = model_fingerprint(config.base)
    tokenizer = load_tokenizer(config.base)
    template = read_chat_template(config.chat_template)
    prints = {"model_fingerprint": fingerprint}
    prints["tokenizer_fingerprint"], prints["template_fingerprint"] = fingerprints(tokenizer, template)
    store = None if config.store is None else _store_manifest(config.store, prints)
    layers = _layers(config, store, int(load_config(config.base).num_hidden_layers))
    max_length = config.max_length if store is None else store.max_length
    truncation = config.truncation if store is None else store.truncation
    table = judged_rollouts(config, fingerprint, progress)
    filtered = filter_scenarios(table, config.max_base_rate)
    require_scenarios(filtered)
    renderer = Renderer(tokenizer, max_length=max_length, truncation=truncation, chat_template=template)
    backend = HFBackend.load(
        config.base,
        layers,
        device=config.device,
        dtype=config.dtype,
        max_length=max_length,
        token_budget=config.token_budget,
        fingerprint=fingerprint,
    )
    vectors = change_vectors(table, filtered.pairs, renderer, backend, progress)
    directions = _directions(config, vectors, layers, prints)
    save_directions(config.out, directions, _manifest(config, table, filtered, vectors, prints))
    return BehaviorSummary(
        out=config.out,
        rollouts=config.rollouts_out,
        name=config.direction_name,
        directions=tuple(dict.fromkeys(direction.name for direction in directions)),
        layers=layers,
        width=backend.width,
        judge=str(table.manifest.get("judge", "")),
        missing_verdicts=sum(cell.missing for cell in filtered.cells),
        scenarios=filtered.scenarios,
        kept=len(vectors.scenarios),
        dropped=filtered.dropped,
        rollout_pairs=vectors.pairs,
        unusable=vectors.unusable,
        cells=filtered.cells,
        seconds=time.perf_counter() - begun,
    )


def judged_rollouts(config: BehaviorConfig, base_fingerprint: str, progress: Progress) -> RolloutTable:
    """Sample or read the rollouts, judge them, and keep both beside the direction file.

    Raises:
        DataMismatchError: the rollouts were sampled from another base model.
        DataError, ConfigError, ModelError: see `sample_rollouts` and `read_rollouts`.
    """
    judge = load_rules(config.rules)
    if config.rollouts is not None:
        prompts = None if config.prompts is None else load_prompts(config.prompts)
        table = read_rollouts(config.rollouts, prompts=prompts, label_column=config.label_column)
        made_from = table.manifest.get("identity", {}).get("base_fingerprint", base_fingerprint)
        if made_from != base_fingerprint:
            raise DataMismatchError(
                f"the base rollouts of {config.rollouts} come from the model with fingerprint {made_from}, but --base "
                f"{config.base} has {base_fingerprint}; both must be the same checkpoint"
            )
        if config.label_column is None and (config.rules is not None or not table.has_verdicts):
            table = table.judged(judge, progress)
    else:
        assert config.prompts is not None and config.tuned is not None
        shared = ("temperature", "samples", "max_new_tokens", "batch_size", "seed", "device", "dtype", "chat_template")
        options = {name: getattr(config, name) for name in shared}
        table = sample_rollouts(
            RolloutConfig(
                prompts=config.prompts, base=config.base, tuned=config.tuned, out=config.rollouts_out, **options
            ),
            progress,
        ).judged(judge, progress)
    _refuse_overwriting(table, config.rollouts_out)
    table.write(config.rollouts_out)
    return table


def _refuse_overwriting(table: RolloutTable, path: str) -> None:
    """Rollouts cost hours: they are replaced only by the same rollouts with new verdicts."""
    if not Path(path).exists():
        return
    existing = read_rollouts(path).table
    if not existing.drop_columns(["verdict", "judge"]).equals(table.table.drop_columns(["verdict", "judge"])):
        raise ConfigError(f"{path} exists and holds other rollouts; choose another --out or move it away")


def _store_manifest(path: str, prints: dict[str, str]) -> Manifest:
    """The manifest of the store that the directions are meant for.

    Raises:
        StoreMismatchError: it was made with another model, tokenizer or template than `prints`.
    """
    from pairtrace.store.reader import ActivationStore

    manifest = ActivationStore.open(path, allow_incomplete=True).manifest
    for field, expected in prints.items():
        actual = getattr(manifest, field)
        if actual != expected:
            raise StoreMismatchError(
                field, expected, actual, "give the --base and --chat-template that the store was extracted with"
            )
    return manifest


def _layers(config: BehaviorConfig, store: Manifest | None, depth: int) -> tuple[int, ...]:
    if config.layers is not None:
        layers = tuple(sorted(set(config.layers)))
    else:
        layers = tuple(range(1, depth + 1)) if store is None else store.layers
    outside = [layer for layer in layers if not 0 <= layer <= depth]
    if outside:
        raise LayerError(f"layer {outside[0]} is outside {config.base}, which has layers 0 to {depth}")
    return layers


def _directions(
    config: BehaviorConfig, vectors: ChangeVectors, layers: tuple[int, ...], prints: dict[str, str]
) -> list[Direction]:
    made = []
    for position, layer in enumerate(layers):
        common: dict[str, Any] = {
            "layer": layer,
            "origin": config.out,
            "model_fingerprint": prints["model_fingerprint"],
            "template_fingerprint": prints["template_fingerprint"],
        }
        name = config.direction_name
        if config.kinds in ("mean", "both"):
            mean = vectors.mean[position : position + 1]
            made.append(Direction(name=name, values=mean, kind="vector", **common))
        if config.kinds in ("bank", "both"):
            bank = np.ascontiguousarray(vectors.bank[:, position])
            made.append(Direction(name=f"{name}-bank", values=bank, kind="bank", **common))
    return made


def _manifest(
    config: BehaviorConfig,
    table: RolloutTable,
    filtered: Filtered,
    vectors: ChangeVectors,
    prints: dict[str, str],
) -> dict[str, Any]:
    return {
        "tokenizer_fingerprint": prints["tokenizer_fingerprint"],
        "config": asdict(config),
        "rollouts": table.manifest,
        "scenarios": list(vectors.scenarios),
        "rollout_pairs": vectors.pairs,
        "unusable": vectors.unusable,
        "dropped": filtered.dropped,
        "cells": [
            {
                "model": cell.model,
                "condition": cell.condition,
                "rollouts": cell.rollouts,
                "missing": cell.missing,
                "shown": cell.shown,
            }
            for cell in filtered.cells
        ],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
