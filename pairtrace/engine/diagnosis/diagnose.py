"""Diagnosis of a ranking: is there something at its top that an edit can take away?

Legend: n ranked pairs, k of them in the top.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pairtrace.engine.diagnosis.agreement import (
    LayerAgreement,
    Stability,
    agreement,
    resampled_prompts,
    resampled_rollouts,
    stability,
)
from pairtrace.engine.diagnosis.concentration import (
    FAR_TAIL,
    TAIL,
    Excess,
    Mass,
    Shift,
    flipped_excess,
    mass,
    random_excess,
    shift,
)
from pairtrace.engine.diagnosis.config import FEWEST_PAIRS, TOP_SHARE, DiagnoseConfig, NotMeasured
from pairtrace.engine.diagnosis.confounding import LengthConfounding, SourceConfounding, source_confounding
from pairtrace.engine.diagnosis.findings import Finding, Measured
from pairtrace.engine.diagnosis.inputs import (
    Behavior,
    ScoredPairs,
    find_behavior,
    open_store,
    read_scores,
    scored_kind,
)
from pairtrace.engine.diagnosis.lengths import measured_lengths
from pairtrace.engine.diagnosis.likeness import Likeness, likeness, own_scores
from pairtrace.engine.diagnosis.null import data_like, sample_units, sphere_like
from pairtrace.engine.diagnosis.sweep import Group, Swept, sweep, thinned
from pairtrace.engine.diagnosis.verdict import Verdict, judge
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.scored_data import open_scored_data
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.errors import ConfigError
from pairtrace.store.layout import OK
from pairtrace.store.reader import ActivationStore

# What scores that name no method were made by.
COSINE = "cosine"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `diagnose` found; a figure that the inputs do not allow says why instead.

    Attributes:
        scores: the scores file.
        behavior: that was diagnosed.
        method: that made the scores.
        pairs: n, ranked pairs.
        k: size of the top.
        verdict: "concentrated", "mixed" or "diffuse"; "undecided" where the figures that decide are not measured.
        reason: what decided it, in one sentence.
        findings: every figure that has a threshold, with one sentence of advice.
        likeness: pairs that look like the behaviour's own prompts.
        excess: pairs in the upper tail beyond chance, by null.
        mass: how the positive scores are spread.
        opposite_mass: the same at the ranking's other end, as a null.
        shift: whether all pairs lean towards the behaviour.
        length, source: confounding.
        prompts, rollouts: stability under resampling of prompts, and of rollouts within prompts.
        layers: agreement with other layers.
        seconds: wall time.
    """

    scores: str
    behavior: str
    method: str
    pairs: int
    k: int
    verdict: Verdict
    reason: str
    findings: tuple[Finding, ...]
    likeness: Likeness | NotMeasured
    excess: tuple[Excess | NotMeasured, ...]
    mass: Mass
    opposite_mass: Mass
    shift: Shift | NotMeasured
    length: LengthConfounding | NotMeasured
    source: SourceConfounding | NotMeasured
    prompts: Stability | NotMeasured
    rollouts: Stability | NotMeasured
    layers: tuple[LayerAgreement, ...] | NotMeasured
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _FromStore:
    """The figures that need directions and a store."""

    random: tuple[Excess, ...]
    shift: Shift
    prompts: Stability | NotMeasured
    rollouts: Stability | NotMeasured
    layers: tuple[LayerAgreement, ...] | NotMeasured


def diagnose(config: DiagnoseConfig, progress: Progress = NULL_PROGRESS) -> Diagnosis:
    """Tell whether editing the top of a ranking is likely to work.

    Raises:
        DataFormatError: not a scores file.
        ConfigError: `behavior` or `k` cannot be used, too few pairs have a rank, or the file holds the best rows only
            and the others cannot be scored again.
        DataMismatchError: a store, direction file, rollouts file or data that was given belongs to other scores.
        StoreError, DirectionError, DataError, ModelError: a file that was given cannot be used.
    """
    begun = time.perf_counter()
    table = ScoresTable.open(config.scores, allow_top=True)
    name = table.choose(config.behavior)
    store = open_store(table, config)
    if config.data is not None:
        # Lengths come from the store where there is one; data that belongs to other scores is an error all the same.
        open_scored_data(table, config.data, config.split)
    behavior = find_behavior(table, name, store, config)
    pairs = read_scores(table, name) if table.keep_top is None else _scored_again(table, store, behavior, progress)
    count = len(pairs.rows)
    if count < FEWEST_PAIRS:
        raise ConfigError(
            f"{table.path} ranks {count} pairs for {name!r}; a diagnosis needs at least {FEWEST_PAIRS}, since fewer "
            "say nothing about a tail"
        )
    k = config.k if config.k is not None else max(10, round(TOP_SHARE * count))
    if k > count // 2:
        raise ConfigError(f"-k is {k}, but a top is at most half of the {count} ranked pairs")
    rng = np.random.default_rng(config.seed)
    alike: Likeness | NotMeasured
    measured: _FromStore | NotMeasured
    if isinstance(behavior, NotMeasured):
        alike = measured = behavior
        _require_directions(config, behavior)
    else:
        assert isinstance(store, ActivationStore)
        alike = (
            behavior.bank
            if isinstance(behavior.bank, NotMeasured)
            else likeness(pairs.scores, own_scores(behavior.bank, behavior.scored.kind), rng)
        )
        measured = _from_store(config, store, behavior, pairs, k, rng, progress)
    missing = measured if isinstance(measured, NotMeasured) else None
    found: dict[str, Any] = {
        "likeness": alike,
        "shift": missing or measured.shift,  # type: ignore[union-attr]
        "length": measured_lengths(config, table, store, pairs, k),
        "source": _sources(pairs, k),
        "prompts": missing or measured.prompts,  # type: ignore[union-attr]
        "rollouts": missing or measured.rollouts,  # type: ignore[union-attr]
        "layers": missing or measured.layers,  # type: ignore[union-attr]
    }
    random = missing or measured.random  # type: ignore[union-attr]
    method = str(table.manifest.get("method") or COSINE)
    flipped = flipped_excess(pairs.scores, k, centred=method != COSINE or scored_kind(table, name) == "bank")
    spread = mass(pairs.scores, k)
    judged = judge(Measured(random=random, flipped=flipped, mass=spread, **found))
    return Diagnosis(
        scores=table.path,
        behavior=name,
        method=method,
        pairs=count,
        k=k,
        verdict=judged.verdict,
        reason=judged.reason,
        findings=judged.findings,
        excess=(flipped, *((random,) if isinstance(random, NotMeasured) else random)),
        mass=spread,
        opposite_mass=mass(-pairs.scores, k),
        seconds=time.perf_counter() - begun,
        **found,
    )


def _require_directions(config: DiagnoseConfig, why: NotMeasured) -> None:
    """Options that only directions could answer are refused where there are none."""
    for option, given in (("--directions", config.directions), ("--rollouts", config.rollouts)):
        if given is not None:
            raise ConfigError(f"{option} is {given}, but it cannot be used: {why.not_measured}")


def _scored_again(
    table: ScoresTable, store: ActivationStore | NotMeasured, behavior: Behavior | NotMeasured, progress: Progress
) -> ScoredPairs:
    """The scores of all pairs, where the file holds the best ones only.

    Raises:
        ConfigError: the store or the directions are not there.
    """
    for needed in (store, behavior):
        if isinstance(needed, NotMeasured):
            raise ConfigError(
                f"{table.path} holds only the top {table.keep_top} rows of each behaviour (it was made with "
                f"--keep-top), and the others cannot be scored again: {needed.not_measured}"
            )
    assert isinstance(store, ActivationStore) and isinstance(behavior, Behavior)
    rows = np.flatnonzero(store.status() == OK)
    bank = Group.of_banks(behavior.scored.values[None])
    scores = sweep(store, behavior.layer, rows, [bank], progress).scores[0][:, 0]
    ranked = np.isfinite(scores)
    return ScoredPairs(rows=rows[ranked], scores=scores[ranked], sources=store.sources()[rows[ranked]])


def _sources(pairs: ScoredPairs, k: int) -> SourceConfounding | NotMeasured:
    if len(set(pairs.sources.tolist())) < 2:
        return NotMeasured(not_measured="all pairs have the same source, or none is known")
    return source_confounding(pairs.scores, pairs.sources, k)


def _from_store(
    config: DiagnoseConfig,
    store: ActivationStore,
    behavior: Behavior,
    pairs: ScoredPairs,
    k: int,
    rng: np.random.Generator,
    progress: Progress,
) -> _FromStore:
    """One pass over the scored layer for the nulls and the bootstrap, and one over each other layer."""
    places = thinned(pairs.rows)
    rows = pairs.rows[places]
    top = max(1, round(k * len(rows) / len(pairs.rows)))
    kind, values, layer = behavior.scored.kind, behavior.scored.values, behavior.layer
    groups = {
        "data-like": data_like(values, sample_units(store, layer, rows, rng), config.null_directions, rng),
        "sphere": sphere_like(values, config.null_directions, rng),
    }
    if not isinstance(behavior.bank, NotMeasured):
        groups["prompts"] = resampled_prompts(behavior.bank, kind, config.resamples, rng)
    drawn_from = 0
    if config.rollouts is not None:
        from pairtrace.engine.diagnosis.rollout_vectors import rollout_vectors

        single = rollout_vectors(config.rollouts, behavior.file, layer, config.base, config.device, progress)
        groups["rollouts"] = resampled_rollouts(single.vectors, single.scenarios, kind, config.resamples, rng)
        drawn_from = len(single.vectors)
    swept = dict(zip(groups, _unpacked(sweep(store, layer, rows, list(groups.values()), progress)), strict=True))
    prompts: Stability | NotMeasured
    rollouts: Stability | NotMeasured
    if isinstance(behavior.bank, NotMeasured):
        prompts = behavior.bank
    else:
        prompts = stability("prompts", len(behavior.bank), swept["prompts"], top)
    if config.rollouts is None:
        rollouts = NotMeasured(
            not_measured="rollouts are read through the base model again; give their file with --rollouts"
        )
    else:
        rollouts = stability("rollouts", drawn_from, swept["rollouts"], top)
    return _FromStore(
        random=tuple(
            random_excess(pairs.scores, null, tail, swept[null])
            for null in ("data-like", "sphere")
            for tail in (TAIL, FAR_TAIL)
        ),
        shift=shift(pairs.scores, swept["data-like"]),
        prompts=prompts,
        rollouts=rollouts,
        layers=_layers(store, behavior, rows, pairs.scores[places], top, progress),
    )


def _unpacked(swept: Swept) -> list[Any]:
    """Per group its scores, or their distribution."""
    return [
        scores if histogram is None else histogram
        for scores, histogram in zip(swept.scores, swept.histograms, strict=True)
    ]


def _layers(
    store: ActivationStore, behavior: Behavior, rows: np.ndarray, scores: np.ndarray, k: int, progress: Progress
) -> tuple[LayerAgreement, ...] | NotMeasured:
    others = [one for layer, one in sorted(behavior.by_layer.items()) if layer != behavior.layer]
    if not others:
        what = f"{store.path} holds a single layer" if len(store.layers) == 1 else f"{behavior.file} holds one layer"
        return NotMeasured(not_measured=f"{what} of the behaviour: nothing to compare layer {behavior.layer} with")
    found = []
    for other in others:
        assert other.layer is not None
        bank = Group.of_banks(other.values[None])
        swept = sweep(store, other.layer, rows, [bank], progress)
        correlation, overlap = agreement(scores, swept.scores[0][:, 0], k)
        found.append(LayerAgreement(layer=other.layer, spearman=correlation, top_overlap=overlap))
    return tuple(found)
