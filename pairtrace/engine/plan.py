"""The plan: what an extraction will cost, before it runs. Reads configuration, tokenizer and data, never weights.

Legend: N rows, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from pairtrace.engine.data_config import DataConfig
from pairtrace.engine.extract import default_shard_rows
from pairtrace.engine.flops import ModelShape, extraction_flops, published_flops
from pairtrace.engine.pairs import PairSource
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.rendered import Quarantined
from pairtrace.errors import ConfigError

if TYPE_CHECKING:
    from pairtrace.engine.rendering import Renderer

# Dense bfloat16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets (figures with sparsity halved).
GPU_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H100-PCIE": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX4090": 165e12,
}
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}
CONFIDENCE = 0.95
# Per row, whatever the layers: pair_id, three token counts, status.
_ROW_BYTES = 16 + 12 + 1
# Of a norm or scale.
_SCALAR_BYTES = 4
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class PlanConfig(DataConfig):
    """What `plan` estimates, beside what `DataConfig` says; the weights of `model` are not fetched.

    Attributes:
        dtype: of the stored rows.
        sides: also keep the means of chosen and rejected.
        sample: rows to tokenise for the estimate; None tokenises all of them.
        seed: of the choice of rows.
        gpu: name in `GPU_FLOPS`.
        gpu_flops: peak of one device in FLOP/s; replaces `gpu`.
        mfu: share of the peak that the run is assumed to reach.
        price_per_hour: of one device, in any currency.
    """

    dtype: str = "float16"
    sides: bool = False
    sample: int | None = 512
    seed: int = 0
    gpu: str | None = None
    gpu_flops: float | None = None
    mfu: float = 0.4
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in ITEM_BYTES:
            raise ConfigError(f"--dtype is {self.dtype!r}; expected one of {', '.join(ITEM_BYTES)}")
        if self.sample is not None and self.sample < 2:
            raise ConfigError(f"--sample is {self.sample}; an interval needs at least 2 rows")
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"--utilisation is {self.mfu}; expected a share above 0, at most 1")
        if self.gpu is not None and self.gpu.upper() not in GPU_FLOPS:
            raise ConfigError(
                f"unknown GPU {self.gpu!r}; known are {', '.join(GPU_FLOPS)}; for another give its peak FLOP/s with "
                "--gpu-flops"
            )
        for option, value in (("--gpu-flops", self.gpu_flops), ("--price", self.price_per_hour)):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{option} is {value}; expected a positive number")

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of the device, None when no device was named."""
        if self.gpu_flops is not None:
            return self.gpu_flops
        return None if self.gpu is None else GPU_FLOPS[self.gpu.upper()]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A total over all rows with its 95 % interval (no width when every row was tokenised)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """The cost of one way to extract.

    Attributes:
        name: "pairtrace" or "published".
        tokens: that the forward passes compute.
        flops: analytic operations.
        hours: of one device; None without a device.
        money: in the currency of the price; None without a price or device.
    """

    name: str
    tokens: Estimate
    flops: Estimate
    hours: float | None
    money: float | None


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """The plan.

    Attributes:
        data: what the data was recognised as, in words.
        rows: N.
        sampled: rows that were tokenised.
        quarantined: of these, rows that cannot be used, by reason.
        pairtrace: cost of this package's extraction.
        published: cost of two full forward passes per pair.
        flop_ratio: published / pairtrace; None when no row can be used.
        store_bytes: size of the store without the texts of sources and reasons, uncompressed.
        layers: to be stored.
        width: D.
        assumptions: what the figures rest on, in words.
    """

    data: str
    rows: int
    sampled: int
    quarantined: dict[str, int]
    pairtrace: Procedure
    published: Procedure
    flop_ratio: float | None
    store_bytes: int
    layers: tuple[int, ...]
    width: int
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return asdict(self)


def plan(config: PlanConfig, progress: Progress = NULL_PROGRESS) -> PlanSummary:
    """Estimate tokens, operations, size, hours and money of an extraction.

    Raises:
        DataError: the data cannot be read.
        ModelError, LayerError, UnsupportedModelError: the configuration or tokenizer cannot be used.
        ConfigError: an option is out of range.
    """
    from pairtrace.engine.architectures import check_layers
    from pairtrace.engine.checkpoint import load_config, resolve_checkpoint

    path = str(resolve_checkpoint(config.model, weights=False))
    model_config = load_config(path)
    check_layers(config.layers, model_config)
    shape = ModelShape.from_config(model_config)
    source = config.open_source()
    renderer = config.load_renderer(path)
    counts, quarantined = _count_tokens(config, source, renderer, progress)
    prompt, chosen, rejected = counts[:, 0], counts[:, 1], counts[:, 2]
    shared = extraction_flops(shape, max(config.layers), prompt, chosen, rejected)
    twice = published_flops(shape, prompt, chosen, rejected)
    ours = _procedure(config, "pairtrace", counts.sum(axis=1), shared, source.rows)
    theirs = _procedure(config, "published", counts.sum(axis=1) + prompt, twice, source.rows)
    layers = tuple(sorted(set(config.layers)))
    return PlanSummary(
        data=source.describe(),
        rows=source.rows,
        sampled=len(counts),
        quarantined=quarantined,
        pairtrace=ours,
        published=theirs,
        flop_ratio=theirs.flops.value / ours.flops.value if ours.flops.value else None,
        store_bytes=_store_bytes(config, source.rows, len(layers), shape.width),
        layers=layers,
        width=shape.width,
        assumptions=_assumptions(config, len(counts), source.rows),
    )


def _store_bytes(config: PlanConfig, rows: int, layers: int, width: int) -> int:
    vectors = layers * (3 if config.sides else 1)
    size = rows * (_ROW_BYTES + layers * _SCALAR_BYTES + vectors * width * ITEM_BYTES[config.dtype])
    if config.dtype == "int8":  # one scale per row, and one per column of each shard
        shards = -(-rows // default_shard_rows(rows))
        size += vectors * (rows + shards * width) * _SCALAR_BYTES
    return size


def _count_tokens(
    config: PlanConfig, source: PairSource, renderer: Renderer, progress: Progress
) -> tuple[np.ndarray, dict[str, int]]:
    """Prompt, chosen and rejected tokens of the sampled rows, float64 [n, 3] (0 where quarantined), and reasons."""
    whole = config.sample is None or config.sample >= source.rows
    count = source.rows if config.sample is None else min(config.sample, source.rows)
    progress.start("tokenise", count, "pairs")
    counts = np.zeros((count, 3))
    quarantined: dict[str, int] = {}
    done = 0
    for chunk in _chunks(source, None if whole else count, config.seed):
        for result in renderer.render(chunk):
            if isinstance(result, Quarantined):
                quarantined[result.code] = quarantined.get(result.code, 0) + 1
            else:
                counts[done] = result.prompt_tokens, result.chosen_tokens, result.rejected_tokens
            done += 1
        progress.advance(len(chunk))
    progress.finish()
    assert done == count, (done, count)
    return counts, quarantined


def _chunks(source: PairSource, sample: int | None, seed: int) -> Iterator[list[Any]]:
    if sample is None:
        chunk = []
        for pair in source.read():
            chunk.append(pair)
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
        return
    rows = np.sort(np.random.default_rng(seed).choice(source.rows, size=sample, replace=False))
    pairs = source.take(rows.tolist())
    for start in range(0, sample, _CHUNK):
        yield pairs[start : start + _CHUNK]


def _total(values: np.ndarray, rows: int) -> Estimate:
    """Total over all rows from a random sample, normal interval with finite-population correction."""
    count = len(values)
    value = float(values.mean()) * rows
    if count == rows:
        return Estimate(value=value, low=value, high=value)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    spread = z * rows * float(values.std(ddof=1)) * ((1 - count / rows) / count) ** 0.5
    return Estimate(value=value, low=max(0.0, value - spread), high=value + spread)


def _procedure(config: PlanConfig, name: str, tokens: np.ndarray, flops: np.ndarray, rows: int) -> Procedure:
    total = _total(flops, rows)
    hours = None if config.peak_flops is None else total.value / (config.peak_flops * config.mfu) / 3600
    money = None if hours is None or config.price_per_hour is None else hours * config.price_per_hour
    return Procedure(name=name, tokens=_total(tokens, rows), flops=total, hours=hours, money=money)


def _assumptions(config: PlanConfig, sampled: int, rows: int) -> tuple[str, ...]:
    lines = []
    if sampled < rows:
        lines.append(
            f"tokens and FLOPs are estimated from {sampled:,} of {rows:,} rows (seed {config.seed}); "
            f"the intervals cover {CONFIDENCE:.0%}"
        )
    else:
        lines.append(f"all {rows:,} rows were tokenised")
    lines.append(
        "pairtrace's tokens and FLOPs are an upper bound: shared response beginnings, repeated pairs and --reuse are "
        "not counted"
    )
    lines.append(
        "FLOPs are analytic: matrix products and causal attention; the published procedure runs two full forwards with "
        "the LM head"
    )
    if config.peak_flops is None:
        lines.append("no device was named, so there are no hours: give a GPU name or its peak FLOP/s")
    else:
        named = config.gpu.upper() if config.gpu is not None and config.gpu_flops is None else "the device"
        lines.append(f"{named} is taken to have {config.peak_flops / 1e12:,.0f} TFLOP/s (dense bfloat16)")
        lines.append(
            f"both procedures are assumed to reach {config.mfu:.0%} of it (--utilisation); at batch size 1 the "
            "published one reaches less in practice"
        )
        lines.append("loading the model, tokenising and writing are taken to hide behind the forward passes")
    if config.price_per_hour is None:
        lines.append("no price per hour was given, so there is no money figure")
    lines.append("the store size leaves out the texts of sources and quarantine reasons")
    return tuple(lines)
