"""The extraction stage: a preference data set and a checkpoint become an activation store."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.data_config import DataConfig
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.vllm.options import VLLMOptions, check_backend
from pairtrace.errors import ConfigError
from pairtrace.store.codecs import parse_codec
from pairtrace.store.manifest import DTYPES, Manifest

if TYPE_CHECKING:
    from pairtrace.engine.pairs import PairSource
    from pairtrace.engine.rendering import Renderer
    from pairtrace.engine.shard_loop import Totals

logger = logging.getLogger(__name__)

LARGEST_SHARD = 2048
SMALLEST_SHARD = 64
# A small data set still gets about this many shards, so that an interruption loses little of it.
SHARDS_WANTED = 64
# Rows rendered before the model is even loaded: a wrong template or format shows at once.
_PROBE_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(DataConfig):
    """What `extract` does, beside what `DataConfig` says.

    Attributes:
        store: path of the activation store, made or resumed.
        sides: also keep the means of chosen and rejected (needed to train probes).
        dtype: dtype of the stored rows.
        codec: compression of the stored rows: "none", "zstd:LEVEL", "blosc-lz4:LEVEL" or "blosc-zstd:LEVEL".
        compute_dtype: dtype of the forward pass; "auto" is the checkpoint's own.
        device: "auto", "cpu", "cuda" or "cuda:N".
        token_budget: tokens per forward pass; None for the device's default.
        shard_rows: rows per shard; None picks 64 to 2,048 by the size of the data.
        reuse: other stores to copy known pairs from.
        fsync: force every shard to the disk before it is marked.
        scheduler: address of a Dask scheduler whose workers compute the shards; None computes them here.
        backend: "hf" (transformers), or "vllm". Their values differ in the last bits, so a store has one of them.
        vllm: how vLLM is run; None for its defaults.
    """

    store: str
    sides: bool = False
    dtype: str = "float16"
    codec: str = "none"
    compute_dtype: str = "auto"
    device: str = "auto"
    token_budget: int | None = None
    shard_rows: int | None = None
    reuse: tuple[str, ...] = ()
    fsync: bool = True
    scheduler: str | None = None
    backend: str = "hf"
    vllm: VLLMOptions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.backend, self.vllm)
        if self.backend != "hf" and self.scheduler is not None:
            raise ConfigError(f"--scheduler runs --backend hf on its workers, but --backend is {self.backend}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown store dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        parse_codec(self.codec)
        for name in ("token_budget", "shard_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected a positive number")


@dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """What an extraction did.

    Attributes:
        store: path of the store.
        rows: rows of the data set; equals `ok + quarantined`.
        ok: rows with activations.
        quarantined: rows without, each with its reason in the store.
        reasons: quarantined rows by reason code.
        computed: rows that this run computed.
        reused: rows that this run copied from an identical pair.
        resumed: rows that were already in the store when this run began.
        tokens: tokens that this run's forward passes computed.
        seconds: wall time of this run, loading included.
        pairs_per_second: rows computed, copied or quarantined per second of the shard loop.
        tokens_per_second: tokens computed per second of the shard loop.
        out_of_memory: how often the token budget was halved.
        token_budget: the budget at the end, 0 if the model was not needed.
        layers: layers in the store.
        width: D.
        bytes: size of the stored arrays.
        device: where the model ran.
        workers: workers of a cluster that took part; 0 for a run without one.
        compute_dtype: dtype of the forward pass.
        data_format: what the data was recognised as.
        already_complete: nothing was left to do.
    """

    store: str
    rows: int
    ok: int
    quarantined: int
    reasons: dict[str, int]
    computed: int = 0
    reused: int = 0
    resumed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    pairs_per_second: float = 0.0
    tokens_per_second: float = 0.0
    out_of_memory: int = 0
    token_budget: int = 0
    layers: tuple[int, ...] = ()
    width: int = 0
    bytes: int = 0
    device: str = ""
    workers: int = 0
    compute_dtype: str = ""
    data_format: str = ""
    already_complete: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def default_shard_rows(rows: int) -> int:
    """Rows per shard for a data set of `rows` rows: a power of two from 64 to 2,048."""
    size = SMALLEST_SHARD
    while size < LARGEST_SHARD and size * SHARDS_WANTED < rows:
        size *= 2
    return size


def extract(config: ExtractConfig, progress: Progress = NULL_PROGRESS) -> ExtractSummary:
    """Fill an activation store from preference data, resuming what an earlier run left unfinished.

    Raises:
        DataError: the data cannot be read or recognised.
        ModelError: the checkpoint or its tokenizer cannot be used.
        StoreMismatchError: the store exists and was made from something else.
        StoreError: the store cannot be written, or another process is writing to it.
        ConfigError: the cluster at `scheduler` fails, or one of its workers does not see what is seen here.
        MissingDependencyError: `scheduler` without Dask, or the back end vllm without vLLM.
        EngineError: vLLM does not start, or died; what it has finished is in the store.
    """
    # An object store has no place beside it.
    path = None if "://" in config.store else costs_path(config.store)
    resumed = path is not None and Path(config.store).exists()
    _refuse_early(config)
    with ExitStack() as stack:
        client, device = None, config.device
        if config.scheduler is not None:
            from pairtrace.engine.dask_cluster import discovery_client

            client, device = stack.enter_context(discovery_client(config.scheduler)), "cpu"
        meter = CostMeter(method="activation", stage="extract", device=device, path=path, resumed=resumed)
        with meter:
            if config.scheduler is not None:
                meter.extra["scheduler"] = config.scheduler
            return _extract(config, client, meter, progress)


def _refuse_early(config: ExtractConfig) -> None:
    """What can be refused before torch, the tokenizer and the data are loaded; all of it is checked again later.

    Raises:
        LayerError: a layer is outside the model.
        ModelError: a local checkpoint has no configuration.
        StoreError: something else is in the place of the store.
        StoreMismatchError: the store holds rows that were made from something else.
    """
    from pairtrace.engine.architectures import check_layers
    from pairtrace.engine.checkpoint import described_blocks
    from pairtrace.store.location import LocalLocation, open_location
    from pairtrace.store.metadata import has_rows, read_manifest, refuse_foreign_directory

    if config.backend == "vllm":
        from pairtrace.engine.vllm.installed import require_vllm

        require_vllm("extraction with --backend vllm")
    blocks = described_blocks(config.model)
    if blocks is not None:
        check_layers(config.layers, SimpleNamespace(num_hidden_layers=blocks))
    location = open_location(config.store)
    if isinstance(location, LocalLocation):
        refuse_foreign_directory(location)
        if has_rows(location) and (existing := read_manifest(location)) is not None:
            existing.require_fields(_known_identity(config, existing))


def _known_identity(config: ExtractConfig, existing: Manifest) -> dict[str, Any]:
    """The part of a store's identity that the settings tell by themselves."""
    from pairtrace.engine.checkpoint import model_fingerprint

    known: dict[str, Any] = {
        name: getattr(config, name) for name in ("max_length", "truncation", "dtype", "codec", "sides", "backend")
    }
    known["layers"] = tuple(sorted(set(config.layers)))
    # The weights are read later in any case; under another path it is worth reading them now.
    if Path(config.model).is_dir() and _model_place(config.model) != existing.model:
        known["model_fingerprint"] = model_fingerprint(config.model)
    return known


def _model_place(model: str) -> str:
    """Absolute, so that commands can be repeated from any directory; a hub id stays as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def _extract(config: ExtractConfig, client: Any, meter: CostMeter, progress: Progress) -> ExtractSummary:
    """`client` is that of a Dask cluster, or None to compute here."""
    from pairtrace.store.reader import ActivationStore
    from pairtrace.store.reuse import compatible
    from pairtrace.store.writer import StoreWriter

    begun = time.perf_counter()
    source = config.open_source()
    logger.info("%s", source.describe())
    renderer = config.load_renderer(config.model)
    renderer.render(list(source.read(0, min(_PROBE_ROWS, source.rows))))
    manifest = build_manifest(config, source, renderer)
    others = [ActivationStore.open(path, allow_incomplete=True) for path in config.reuse]
    for other in others:
        compatible(other.manifest, manifest)
    with StoreWriter.create_or_resume(config.store, manifest, fsync=config.fsync) as writer:
        missing = writer.missing_shards()
        if client is not None:
            from pairtrace.engine.extract_cluster import ClusterLoop

            cluster = ClusterLoop(client, config, source, renderer, writer, others, meter, progress)
            if missing:
                cluster.run(missing)
            totals = cluster.totals
        else:
            from pairtrace.engine.extract_backend import loaded_backend
            from pairtrace.engine.shard_loop import ShardLoop

            loop = ShardLoop(source, renderer, writer, config.store, others, progress)
            if missing:
                with loaded_backend(config, manifest, meter, progress) as backend:
                    loop.run(backend, missing)
            totals = loop.totals
    return _summary(config, manifest, totals, time.perf_counter() - begun)


def build_manifest(config: ExtractConfig, source: PairSource, renderer: Renderer) -> Manifest:
    """Describe the store that `config` asks for; reads the checkpoint's weights once for their fingerprint."""
    from pairtrace.engine.architectures import check_layers, family_of
    from pairtrace.engine.checkpoint import load_config, model_fingerprint, resolve_dtype
    from pairtrace.engine.fingerprints import fingerprints
    from pairtrace.engine.tree_attention import ATTENTION_NAME
    from pairtrace.engine.versions import library_versions
    from pairtrace.engine.vllm.families import vllm_family
    from pairtrace.engine.vllm.installed import installed_version

    model_config = load_config(config.model)
    layers = tuple(sorted(set(config.layers)))
    check_layers(layers, model_config)
    family_of(model_config, config.max_length)
    attention, versions = ATTENTION_NAME, library_versions()
    if config.backend == "vllm":
        vllm_family(model_config)
        attention, versions = "vllm", {**versions, "vllm": str(installed_version())}
    tokenizer_fingerprint, template_fingerprint = fingerprints(renderer.tokenizer, renderer.chat_template)
    return Manifest(
        rows=source.rows,
        width=int(model_config.hidden_size),
        layers=layers,
        dtype=config.dtype,
        codec=config.codec,
        sides=config.sides,
        shard_rows=min(config.shard_rows or default_shard_rows(source.rows), source.rows),
        compute_dtype=str(resolve_dtype(config.compute_dtype, model_config)).removeprefix("torch."),
        model=_model_place(config.model),
        model_fingerprint=model_fingerprint(config.model),
        tokenizer_fingerprint=tokenizer_fingerprint,
        template_fingerprint=template_fingerprint,
        data_fingerprint=source.fingerprint,
        data=str(Path(config.data).resolve()) if Path(config.data).exists() else config.data,
        data_format=source.format,
        columns=source.columns,
        split=config.split,
        chat_template=None if config.chat_template is None else str(Path(config.chat_template).resolve()),
        template_date=config.template_date,
        max_length=config.max_length,
        truncation=config.truncation,
        attention=attention,
        backend=config.backend,
        limit=config.limit,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions,
    )


def _summary(config: ExtractConfig, manifest: Manifest, totals: Totals, seconds: float) -> ExtractSummary:
    from pairtrace.store.reader import ActivationStore

    figures = ActivationStore.open(config.store).summary()
    rate = 1.0 / totals.seconds if totals.seconds else 0.0
    return ExtractSummary(
        store=str(config.store),
        rows=figures["rows"],
        ok=figures["ok"],
        quarantined=figures["quarantined"],
        reasons=figures["reasons"],
        bytes=figures["bytes"],
        computed=totals.computed,
        reused=totals.reused,
        resumed=totals.resumed,
        tokens=totals.tokens,
        seconds=seconds,
        pairs_per_second=totals.rows * rate,
        tokens_per_second=totals.tokens * rate,
        out_of_memory=totals.out_of_memory,
        token_budget=totals.token_budget,
        layers=manifest.layers,
        width=manifest.width,
        device=totals.device,
        workers=totals.workers,
        compute_dtype=manifest.compute_dtype,
        data_format=manifest.data_format,
        already_complete=totals.rows == 0,
    )
