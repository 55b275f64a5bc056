"""The gradient baseline: LESS for DPO (arXiv 2402.04333), and TracIn (arXiv 2002.08484).

A LoRA adapter on M0 is warmed up with DPO on a small share of the data. At each of its checkpoints i, with learning
rate eta_i, every pair z has a gradient of its DPO loss and the target pairs (chosen shows the behaviour) have a mean
gradient t_i:

- cosine (LESS): sum_i eta_i cos(P Gamma_i(z), P t_i) / sum_i eta_i, where Gamma_i is Adam's direction for the gradient
  and P a random projection.
- tracin: sum_i eta_i <g_i(z), t_i>, plain gradients, no projection.

Everything is kept in a work directory: checkpoints, reference log-probabilities, and per checkpoint either projected
gradients, which serve any target, or products with this target. Legend: N rows, K dimensions of the projection.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pairtrace.engine.baselines.gradient_compute import PairGradients, default_budget
from pairtrace.engine.baselines.gradient_config import GradientConfig
from pairtrace.engine.baselines.gradient_inputs import StorePairs, Target, read_target
from pairtrace.engine.baselines.gradient_model import LoraModel
from pairtrace.engine.baselines.gradient_products import (
    preconditioned,
    projected_rows,
    summed_rows,
    target_products,
)
from pairtrace.engine.baselines.gradient_projection import SparseProjection
from pairtrace.engine.baselines.gradient_rows import DpoSettings, Parts
from pairtrace.engine.baselines.gradient_warmup import Checkpoint, checkpoint_file, warm_up, warmup_rows
from pairtrace.engine.baselines.gradient_work import WorkDirectory
from pairtrace.engine.baselines.scores_file import require_parquet, write_baseline
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.memory import is_out_of_memory
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError, DataError

__all__ = ["GradientConfig", "GradientSummary", "gradient_baseline"]

logger = logging.getLogger(__name__)

_STORE_FIELDS = (
    "model_fingerprint", "tokenizer_fingerprint", "template_fingerprint", "data_fingerprint", "rows", "limit",
    "max_length", "truncation",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GradientSummary:
    """What `gradient_baseline` did.

    Attributes:
        out: the scores file.
        work: directory of checkpoints and gradients.
        name: of the behaviour.
        method: the settings that decide the scores.
        rows: N.
        scored: rows with a score.
        quarantined: rows that the store quarantined.
        unscored: other rows without a score (gradient zero or not finite, or too long for the memory).
        target_pairs: pairs in the target gradient.
        target_unusable: target pairs that were left out, by reason.
        parameters: P of the adapter.
        warmup_pairs: pairs that the warm-up trained on.
        learning_rates: weight of each checkpoint.
        warmup_losses: mean loss of each epoch.
        seconds: wall time of this run.
    """

    out: str
    work: str
    name: str
    method: dict[str, Any]
    rows: int
    scored: int
    quarantined: int
    unscored: int
    target_pairs: int
    target_unusable: dict[str, int]
    parameters: int
    warmup_pairs: int
    learning_rates: tuple[float, ...]
    warmup_losses: tuple[float, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def gradient_baseline(config: GradientConfig, progress: Progress = NULL_PROGRESS) -> GradientSummary:
    """Score every pair of a store by the gradient of its DPO loss; an interrupted run is gone on with.

    Raises:
        ConfigError: an option cannot be used, or the work directory was made with other settings.
        DataError: data or target cannot be used, or the warm-up diverges.
        ModelError: the checkpoint cannot be used.
        StoreError: the store cannot be read, is incomplete, or was made with another model.
        MissingDependencyError: peft is not installed.
    """
    begun = time.perf_counter()
    require_parquet(config.out)
    pairs = StorePairs.open(config.store, data=config.data, base=config.base, chat_template=config.chat_template)
    target = read_target(config, pairs.renderer)
    run = _Run(config, pairs, target, progress)
    run.warm_up()
    run.targets()
    run.gradients()
    return run.finish(begun)


class _Run:
    """One run over one work directory; each stage skips what is finished."""

    def __init__(self, config: GradientConfig, pairs: StorePairs, target: Target, progress: Progress) -> None:
        made = pairs.store.manifest
        self.config, self.pairs, self.target, self.progress = config, pairs, target, progress
        self.dtype = made.compute_dtype if config.compute_dtype == "auto" else config.compute_dtype
        self.settings = {
            **{name: getattr(made, name) for name in _STORE_FIELDS},
            **config.gradient_settings,
            "compute_dtype": self.dtype,
        }
        self.resumed = config.work_directory.exists()
        self.work = WorkDirectory.open(config.work_directory, self.settings)
        self.loss = DpoSettings(beta=config.beta, length_normalized=config.length_normalized)
        self.rows = warmup_rows(pairs.usable, config.warmup_share, config.seed)
        self.spans = [
            (start, min(start + config.shard_rows, made.rows)) for start in range(0, made.rows, config.shard_rows)
        ]
        assert config.projection is not None
        self.projection = SparseProjection(config.projection, config.seed) if config.projection else None

    @cached_property
    def model(self) -> LoraModel:
        """Loaded when the first stage needs it."""
        config = self.config
        return LoraModel.load(
            self.pairs.base,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            seed=config.seed,
            device=config.device,
            dtype=self.dtype,
        )

    def meter(self, stage: str) -> CostMeter:
        """Of a stage that has something left to do."""
        meter = CostMeter(
            method="gradient" if self.config.score == "cosine" else "tracin",
            stage=stage,
            device=self.config.device,
            path=costs_path(self.config.out),
            resumed=self.resumed,
        )
        meter.extra = {
            "procedure": self.config.procedure,
            "checkpoints": self.config.checkpoints,
            "backward": "counts as one forward pass: frozen weights get no gradient",
        }
        return meter

    def computer(self, meter: CostMeter) -> PairGradients:
        """See `PairGradients`."""
        return PairGradients(
            self.model,
            self.loss,
            published=self.config.procedure == "published",
            token_budget=self.config.token_budget,
            meter=meter,
        )

    def checkpoints(self, missing: list[int]) -> Iterator[tuple[int, Checkpoint]]:
        """These checkpoints, each put into the model."""
        for number in missing:
            checkpoint = Checkpoint.load(self.work, number)
            self.model.set_adapter(checkpoint.adapter)
            yield number, checkpoint

    def warm_up(self) -> None:
        """Train the adapter."""
        if self.work.has(checkpoint_file(self.config.checkpoints - 1)):
            return
        with self.meter("warm-up") as meter:
            pairs = self.pairs.take(self.rows.tolist())
            budget = default_budget(self.model, self.config.token_budget)
            try:
                warm_up(self.model, pairs, self.config, budget, self.work, meter, self.progress)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise ConfigError(
                    f"the warm-up does not fit into memory with {budget} tokens per batch; give a smaller "
                    "--token-budget"
                ) from error

    def target_file(self, number: int) -> str:
        """Of the mean target gradient at a checkpoint."""
        return f"targets/{self.config.target_mean}-{self.target.fingerprint[:16]}-{number}.safetensors"

    def targets(self) -> None:
        """Mean gradient of the target pairs at each checkpoint; plain gradients, as LESS has it."""
        missing = [n for n in range(self.config.checkpoints) if not self.work.has(self.target_file(n))]
        if not missing:
            return
        with self.meter("target") as meter:
            pairs = self.target.pairs
            self.progress.start("target gradients", len(missing) * len(pairs), "pairs")
            computer = self.computer(meter)
            references = computer.references(pairs)
            reduce = partial(summed_rows, unit=self.config.target_mean == "directions")
            for number, _ in self.checkpoints(missing):
                total, count = torch.zeros(self.model.size, device=self.model.device), 0
                for members, part in computer.reduced(pairs, references, reduce):
                    if part is not None:
                        total += part
                        count += len(members)
                    self.progress.advance(len(members))
                if not count:
                    raise DataError(f"no target pair has a finite gradient at checkpoint {number}")
                if count < len(pairs):
                    logger.warning("%d target pairs have no finite gradient", len(pairs) - count)
                about = {"pairs": count, "order": list(self.model.parameters)}
                self.work.save_tensors(self.target_file(number), self._split(total.cpu() / count), about)
            self.progress.finish()

    def _split(self, gradient: Tensor) -> dict[str, Tensor]:
        """A gradient [P] by matrices."""
        parts = gradient.split([parameter.numel() for parameter in self.model.parameters.values()])
        return {name: part.clone() for name, part in zip(self.model.parameters, parts, strict=True)}

    def shard_file(self, number: int, shard: int) -> str:
        """Of the rows of a shard at a checkpoint."""
        kind = (
            "gradients"
            if self.projection is not None
            else f"products/{self.config.target_mean}-{self.target.fingerprint[:16]}"
        )
        return f"{kind}/checkpoint-{number}/shard-{shard:05d}.npy"

    def gradients(self) -> None:
        """Gradients of every usable row at each checkpoint, projected or as products with the target."""
        missing = {
            number: [shard for shard in range(len(self.spans)) if not self.work.has(self.shard_file(number, shard))]
            for number in range(self.config.checkpoints)
        }
        wanted = [number for number, shards in missing.items() if shards]
        if not wanted:
            return
        with self.meter("gradients") as meter:
            rows = sum(self.spans[shard][1] - self.spans[shard][0] for shards in missing.values() for shard in shards)
            self.progress.start("pair gradients", rows, "pairs")
            computer = self.computer(meter)
            for number, checkpoint in self.checkpoints(wanted):
                reduce = self._reduction(number, checkpoint)
                for shard in missing[number]:
                    self._shard(computer, number, shard, reduce)
            self.progress.finish()

    def _reduction(self, number: int, checkpoint: Checkpoint) -> Any:
        device = self.model.device
        if self.projection is not None:
            last: Any = partial(projected_rows, projection=self.projection)
        else:
            target = {name: value.to(device) for name, value in self.work.tensors(self.target_file(number))[0].items()}
            last = partial(target_products, target=target)
        if self.config.preconditioner == "none":
            return last
        first, second = (
            {name: value.flatten().to(device) for name, value in moments.items()}
            for moments in (checkpoint.first, checkpoint.second)
        )
        return lambda parts: last(preconditioned(parts, first, second))

    def _shard(self, computer: PairGradients, number: int, shard: int, reduce: Any) -> None:
        start, stop = self.spans[shard]
        pairs = self.pairs.shard(start, stop)
        references = self._references(computer, shard, pairs)
        # Unit vectors lose nothing that a cosine shows in float16; dot products of tiny gradients would.
        shape, dtype = ((self.projection.size,), np.float16) if self.projection is not None else ((2,), np.float64)
        values = np.full((stop - start, *shape), np.nan, dtype)
        for members, found in computer.reduced(pairs, references, reduce):
            if found is not None:
                values[[pairs[member].row - start for member in members]] = found.cpu().numpy()
            self.progress.advance(len(members))
        self.progress.advance(stop - start - len(pairs))
        self.work.save_array(self.shard_file(number, shard), values)

    def _references(self, computer: PairGradients, shard: int, pairs: list[Any]) -> np.ndarray | None:
        """Reference log-probabilities of a shard, computed at its first checkpoint."""
        name = f"reference/shard-{shard:05d}.npy"
        if self.work.has(name):
            return self.work.array(name)
        found = computer.references(pairs)
        if found is not None:
            self.work.save_array(name, found)
        return found

    def finish(self, begun: float) -> GradientSummary:
        """Put the checkpoints together and write the scores file."""
        config = self.config
        numbers = range(config.checkpoints)
        with self.meter("score"):
            about = [self.work.tensors(checkpoint_file(number)) for number in numbers]
            parameters = sum(value.numel() for key, value in about[0][0].items() if key.startswith("adapter/"))
            rates = np.array([entry["learning_rate"] for _, entry in about])
            weights = rates if config.score == "tracin" else rates / rates.sum()
            scores = np.zeros(self.pairs.store.rows)
            for number in numbers:
                scores += weights[number] * self._similarities(number)
            method = {**config.gradient_settings, "score": config.score, "target_mean": config.target_mean}
            details = {
                **method,
                "target": config.rollouts or config.target,
                "target_fingerprint": self.target.fingerprint,
                "target_pairs": len(self.target.pairs),
                "learning_rates": rates.tolist(),
            }
            written = write_baseline(
                self.pairs.store,
                config.out,
                {config.name: scores.astype(np.float32)},
                method="gradient",
                details=details,
            )
        if written.unscored:
            logger.warning("%d pairs have no score: their gradient is zero or not finite", written.unscored)
        return GradientSummary(
            out=config.out,
            work=str(self.work.path),
            name=config.name,
            method=method,
            rows=written.rows,
            scored=written.scored,
            quarantined=written.quarantined,
            unscored=written.unscored,
            target_pairs=len(self.target.pairs),
            target_unusable=self.target.unusable,
            parameters=parameters,
            warmup_pairs=len(self.rows),
            learning_rates=tuple(rates.tolist()),
            warmup_losses=tuple(entry["loss"] for _, entry in about),
            seconds=time.perf_counter() - begun,
        )

    def _similarities(self, number: int) -> np.ndarray:
        """float64 [N] at one checkpoint: cosines, or dot products for TracIn; NaN where there is none."""
        target, about = self.work.tensors(self.target_file(number))
        shards = [self.shard_file(number, shard) for shard in range(len(self.spans))]
        if self.projection is not None:
            parts: Parts = ((name, target[name][None]) for name in about["order"])
            unit = projected_rows(parts, self.projection)[0].numpy()
            return np.concatenate([self.work.array(name).astype(np.float32) @ unit for name in shards]).astype(float)
        products = np.concatenate([self.work.array(name) for name in shards])
        if self.config.score == "tracin":
            return products[:, 0]
        length = float(np.sqrt(sum(float(value.double().square().sum()) for value in target.values())))
        with np.errstate(divide="ignore", invalid="ignore"):
            return products[:, 0] / (products[:, 1] * length)
