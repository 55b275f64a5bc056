"""The implicit reward margin: how far preference training moved the model towards the chosen response.

`beta * [(log pi_M1(chosen) - log pi_M0(chosen)) - (log pi_M1(rejected) - log pi_M0(rejected))]`, the argument of the
sigmoid in the DPO loss (Rafailov et al., arXiv 2305.18290, eq. 7). Legend: N pairs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pairtrace.engine.baselines.scores_file import BaselineScores, require_parquet, write_baseline
from pairtrace.engine.baselines.store_pairs import (
    load_store_renderer,
    open_store_data,
    rendered_blocks,
    require_store_model,
)
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.journal import Journal
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError, DataFormatError, ModelError
from pairtrace.store.layout import OK
from pairtrace.store.reader import ActivationStore

if TYPE_CHECKING:
    from pairtrace.engine.pairs import PairSource
    from pairtrace.engine.rendering import Renderer

logger = logging.getLogger(__name__)

# Rows between two entries of the journal.
_BLOCK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class MarginConfig:
    """What `score_margin` does.

    Attributes:
        store: path of the activation store.
        tuned: M1, the checkpoint after preference training: a directory or a hub id.
        out: parquet file to write. Log-probabilities are kept beside it, by content: another run in the same
            directory takes those of M0 from there.
        base: M0; None for the checkpoint that the store recorded.
        data: where the preference data is; None for the path that the store recorded.
        chat_template: file with the chat template; None for the one that the store recorded.
        beta: of the DPO loss; it scales the scores and leaves their order.
        device: "auto", "cpu", "cuda" or "cuda:N".
        compute_dtype: dtype of the forward passes; "auto" is each checkpoint's own.
        token_budget: tokens per forward pass; None for the device's default.
        name: of the score column.
    """

    store: str
    tuned: str
    out: str
    base: str | None = None
    data: str | None = None
    chat_template: str | None = None
    beta: float = 0.1
    device: str = "auto"
    compute_dtype: str = "auto"
    token_budget: int | None = None
    name: str = "margin"

    def __post_init__(self) -> None:
        require_parquet(self.out)
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"--beta is {self.beta}; expected a positive number")
        if self.token_budget is not None and self.token_budget < 1:
            raise ConfigError(f"--token-budget is {self.token_budget}; expected at least 1")


def score_margin(config: MarginConfig, progress: Progress = NULL_PROGRESS) -> BaselineScores:
    """Score the pairs of a store by their implicit reward margin under M1 against M0.

    The pairs are rendered as for the extraction. An interrupted run goes on where it stopped.

    Raises:
        StoreError: the store cannot be read or is incomplete, or was made with another checkpoint or tokenizer.
        DataError: the data is not there or is not that of the store.
        ModelError: a checkpoint cannot be used, or M1 is not a further training of M0.
        ConfigError: an option cannot be used, or a file cannot be written.
    """
    store = ActivationStore.open(config.store)
    base = config.base or store.manifest.model
    source = open_store_data(store, config.data)
    renderer = load_store_renderer(store, base, config.chat_template)
    fingerprints = {"m0": require_store_model(store, base), "m1": _tuned_fingerprint(base, config.tuned)}
    if fingerprints["m0"] == fingerprints["m1"]:
        raise ConfigError(f"--tuned {config.tuned} is the checkpoint M0 of the store: every margin would be 0")
    log_probabilities = {
        which: _log_probabilities(config, store, source, renderer, which, model, fingerprints[which], progress)
        for which, model in (("m0", base), ("m1", config.tuned))
    }
    moved = log_probabilities["m1"] - log_probabilities["m0"]
    scores = (config.beta * (moved[:, 0] - moved[:, 1])).astype(np.float32)
    unscored = int((~np.isfinite(scores) & (store.status() == OK)).sum())
    if unscored:
        logger.warning("%d pairs have no margin: out of memory, or a log-probability is not finite", unscored)
    details = {
        "beta": config.beta,
        "base": base,
        "tuned": config.tuned,
        "base_fingerprint": fingerprints["m0"],
        "tuned_fingerprint": fingerprints["m1"],
        "compute_dtype": config.compute_dtype,
    }
    return write_baseline(store, config.out, {config.name: scores}, method="margin", details=details)


def _tuned_fingerprint(base: str, tuned: str) -> str:
    """Fingerprint of M1, once it is known to have the shape of M0: the tokens are those of M0's tokenizer."""
    from pairtrace.engine.checkpoint import load_config, model_fingerprint

    before, after = load_config(base), load_config(tuned)
    for name in ("model_type", "hidden_size", "num_hidden_layers"):
        if getattr(before, name, None) != getattr(after, name, None):
            raise ModelError(
                f"{tuned} is no further training of {base}: its {name} is {getattr(after, name, None)}, expected "
                f"{getattr(before, name, None)}"
            )
    return model_fingerprint(tuned)


def _log_probabilities(
    config: MarginConfig,
    store: ActivationStore,
    source: PairSource,
    renderer: Renderer,
    which: str,
    model: str,
    fingerprint: str,
    progress: Progress,
) -> np.ndarray:
    """Of the responses under one model, float64 [N, 2] (chosen, rejected); NaN for quarantined pairs."""
    from pairtrace.engine.baselines.log_probabilities import ResponseScorer
    from pairtrace.engine.checkpoint import load_config, resolve_dtype

    manifest = store.manifest
    identity = {
        "model_fingerprint": fingerprint,
        **{name: getattr(manifest, name) for name in ("tokenizer_fingerprint", "template_fingerprint")},
        **{name: getattr(manifest, name) for name in ("data_fingerprint", "limit", "max_length", "truncation")},
        "compute_dtype": str(resolve_dtype(config.compute_dtype, load_config(model))).removeprefix("torch."),
        "rows": store.rows,
        "block_rows": _BLOCK_ROWS,
    }
    result = np.full((store.rows, 2), np.nan)
    with Journal(_journal_path(config.out, identity), identity) as journal:
        done = _replay(journal, result)
        if done == store.rows:
            logger.info("%s: log-probabilities of %s are there already", journal.path, model)
            return result
        with CostMeter(
            method="margin",
            stage=f"{which} log-probabilities",
            device=config.device,
            path=costs_path(config.out),
            resumed=done > 0,
        ) as meter:
            scorer = ResponseScorer.load(
                model,
                device=config.device,
                dtype=config.compute_dtype,
                max_length=manifest.max_length,
                token_budget=config.token_budget,
            )
            tokens = 0

            def on_pack(pairs: int, computed: int, flops: float) -> None:
                nonlocal tokens
                tokens += computed
                meter.add(tokens=computed, flops=flops)
                progress.advance(pairs, tokens=tokens)

            progress.start(f"log-probabilities of {which}", store.rows - done, "pairs")
            for start, block in rendered_blocks(store, source, renderer, _BLOCK_ROWS, done):
                usable = [pair for pair in block if pair is not None]
                places = [start + number for number, pair in enumerate(block) if pair is not None]
                result[places] = scorer.log_probabilities(usable, on_pack)
                progress.advance(len(block) - len(usable), tokens=tokens)
                journal.append([_entry(start, result[start : start + len(block)])])
            progress.finish()
    return result


def _journal_path(out: str, identity: dict[str, Any]) -> Path:
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    return Path(out).with_name(f"log-probabilities-{digest}.jsonl")


def _entry(start: int, block: np.ndarray) -> dict[str, Any]:
    """Finished rows as an entry of the journal; what is not finite becomes null."""
    chosen, rejected = ([value if math.isfinite(value) else None for value in column] for column in block.T.tolist())
    return {"start": start, "chosen": chosen, "rejected": rejected}


def _replay(journal: Journal, result: np.ndarray) -> int:
    """Fill in the finished rows of an earlier run; returns their number."""
    done = 0
    for entry in journal.entries:
        columns = [entry.get("chosen"), entry.get("rejected")]
        if entry.get("start") != done or not isinstance(columns[0], list) or not isinstance(columns[1], list):
            raise DataFormatError(f"{journal.path} is damaged (rows {done} are missing); delete it to start again")
        block = np.array(columns, dtype=np.float64).T
        result[done : done + len(block)] = block
        done += len(block)
    return done
