"""What training changed in a model before it says a word: a vector to steer along.

`v_l = mean over prompts of h_l(M1) - h_l(M0)` at the last token of the prompt, where the answer is decided (activation
differences between a model and the one it was trained from: arXiv 2510.13900). A behaviour vector is read over
responses through M0 alone: it tells how a text that shows the behaviour looks to M0, not what makes M1 write it.

Legend: R requests, L layers, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pairtrace.engine.architectures import check_layers
from pairtrace.engine.atomic import require_writable
from pairtrace.engine.checkpoint import load_config
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.directions import PROMPT_END, Direction, direction_name, save_directions
from pairtrace.engine.evaluation.checkpoints import Checkpoint, PromptTokens
from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.likelihood import Forced, batches, flops_of, padded_ids
from pairtrace.engine.evaluation.requests import requests_of
from pairtrace.engine.probes.hooks import decoder_of, reading_layers, require_blocks
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.prompts import load_prompts
from pairtrace.engine.steering.arms import BASE_STATE
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ConfigError, ModelError

METHOD = "steering"
# Halves are compared, and a mean over one prompt is none.
FEWEST_PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    """What `measure_shift` does.

    Attributes:
        prompts: prompt file, as for `evaluate`: those on which the trained model behaves otherwise.
        base: M0, the checkpoint from before training.
        tuned: M1, the checkpoint after it, with the same tokenizer, width and number of blocks.
        out: direction file to write (.safetensors), with a vector per layer and M0's mean state beside it.
        name: of the vector; None takes the stem of `out`.
        layers: residual layers; None for all from 1 on.
        conditions, device, dtype, token_budget, chat_template, template_date: as for `EvaluateConfig`.
    """

    prompts: str
    base: str
    tuned: str
    out: str
    name: str | None = None
    layers: tuple[int, ...] | None = None
    conditions: tuple[str, ...] | None = None
    device: str = "auto"
    dtype: str = "auto"
    token_budget: int = 4096
    chat_template: str | None = None
    template_date: str | None = None

    def __post_init__(self) -> None:
        if not self.out.endswith(".safetensors"):
            raise ConfigError(f"--out is {self.out!r}; direction files end in .safetensors")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ConfigError(f"--layers is {self.layers}; expected distinct layers, or leave it out for all")
        # An unusable name and unusable settings are found here.
        assert self.direction_name
        assert self.reading

    @property
    def direction_name(self) -> str:
        """The vector's name.

        Raises:
            DirectionError: it cannot name a vector.
        """
        return direction_name(self.name, self.out)

    @property
    def reading(self) -> EvaluateConfig:
        """How the models are loaded and the prompts rendered.

        Raises:
            ConfigError: a setting is out of range.
        """
        return EvaluateConfig(
            prompts=self.prompts,
            models=(self.base, self.tuned),
            out=str(Path(self.out).with_suffix(".json")),
            conditions=self.conditions,
            max_new_tokens=1,
            device=self.device,
            dtype=self.dtype,
            token_budget=self.token_budget,
            chat_template=self.chat_template,
            template_date=self.template_date,
        )


@dataclass(frozen=True, kw_only=True)
class LayerShift:
    """The vector of one layer.

    Attributes:
        layer: residual layer.
        length: of the vector, in the units of the activations.
        share: `length` in units of M0's mean state length at the last token of a prompt.
        agreement: cosine of the vectors that the two halves of the prompts give by themselves: near 1 where the
            training moved all prompts alike, near 0 where the mean is an accident of the prompts.
    """

    layer: int
    length: float
    share: float
    agreement: float


@dataclass(frozen=True, kw_only=True)
class ShiftSummary:
    """What `measure_shift` made.

    Attributes:
        out: the direction file.
        name: of the vector.
        requests: R.
        width: D.
        layers: by layer, ascending.
        seconds: wall time.
    """

    out: str
    name: str
    requests: int
    width: int
    layers: tuple[LayerShift, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)

    def to_rows(self) -> list[dict[str, str]]:
        """A table for people: one row per layer."""
        return [
            {
                "layer": str(layer.layer),
                "length": f"{layer.length:.4g}",
                "share": f"{layer.share:.3f}",
                "agreement": f"{layer.agreement:.3f}",
            }
            for layer in self.layers
        ]


def measure_shift(config: ShiftConfig, progress: Progress = NULL_PROGRESS) -> ShiftSummary:
    """Write the vectors by which training moved the state at the end of the prompts.

    Args:
        config: what to do.
        progress: counts requests, model by model.

    Raises:
        DataError: the prompts cannot be used, or are too few.
        ModelError: a checkpoint is missing or damaged, the two cannot be compared, or the state is not finite.
        LayerError, ConfigError: an option cannot be used.
    """
    begun = time.perf_counter()
    require_writable(config.out)
    prompts = load_prompts(config.prompts, mixed=True)
    requests = requests_of(prompts, config.conditions)
    asked = list(dict.fromkeys(request.prompt.id for request in requests))
    if len(asked) < FEWEST_PROMPTS:
        raise ConfigError(f"{config.prompts} has {len(asked)} prompts to ask; expected at least {FEWEST_PROMPTS}")
    # Both conditions of a prompt belong to the same half.
    second = np.isin([request.prompt.id for request in requests], asked[1::2])
    tokens = PromptTokens(requests, max_new_tokens=1)
    base, tuned = (Checkpoint(name, config.reading) for name in (config.base, config.tuned))
    _require_comparable(base, tuned)
    model_config = load_config(config.base)
    require_blocks(model_config)
    layers = tuple(range(1, model_config.num_hidden_layers + 1)) if config.layers is None else config.layers
    layers = tuple(sorted(layers))
    check_layers(layers, model_config)
    read = []
    with CostMeter(method=METHOD, stage="shift", device=config.device, path=costs_path(config.out)) as meter:
        for model in (base, tuned):
            rows = [Forced(ids=ids, start=len(ids)) for ids in tokens.of(model.encoder)]
            read.append(_prompt_ends(model, rows, second, layers, config.token_budget, meter, progress))
            model.release()
    before, after = read
    vectors = after.mean - before.mean
    found = []
    for position, layer in enumerate(layers):
        one, other = after.halves[:, position] - before.halves[:, position]
        length = float(np.linalg.norm(vectors[position]))
        if length == 0:
            raise ModelError(f"{config.tuned} and {config.base} have the same states at layer {layer}; nothing changed")
        agreement = float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))
        share = length / float(before.length[position])
        found.append(LayerShift(layer=layer, length=length, share=share, agreement=agreement))
    identity = base.encoder.identity
    directions = [
        Direction(
            name=config.direction_name,
            layer=layer,
            values=vectors[position : position + 1].astype(np.float32),
            kind="vector",
            origin=config.out,
            model_fingerprint=base.fingerprint,
            tokenizer_fingerprint=identity["tokenizer_fingerprint"],
            template_fingerprint=identity["template_fingerprint"],
            read_at=PROMPT_END,
        )
        for position, layer in enumerate(layers)
    ]
    manifest = {
        "config": asdict(config),
        "tuned_fingerprint": tuned.fingerprint,
        "prompts_fingerprint": prompts.fingerprint,
        "requests": len(requests),
        "by_layer": [asdict(layer) for layer in found],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
    states = {f"{BASE_STATE}{layer}": before.mean[position] for position, layer in enumerate(layers)}
    save_directions(config.out, directions, manifest, tensors=states)
    return ShiftSummary(
        out=config.out,
        name=config.direction_name,
        requests=len(requests),
        width=vectors.shape[1],
        layers=tuple(found),
        seconds=time.perf_counter() - begun,
    )


def _require_comparable(base: Checkpoint, tuned: Checkpoint) -> None:
    if base.fingerprint == tuned.fingerprint:
        raise ModelError(f"--base {base.name} and --tuned {tuned.name} are the same model; nothing changed")
    if base.encoder.identity != tuned.encoder.identity:
        differing = [name for name, value in base.encoder.identity.items() if tuned.encoder.identity[name] != value]
        raise ModelError(
            f"--base {base.name} and --tuned {tuned.name} do not read the same tokens: their "
            f"{', '.join(differing)} differ; give the checkpoint that training began with"
        )
    sizes = [load_config(model.encoder.model) for model in (base, tuned)]
    for field in ("hidden_size", "num_hidden_layers"):
        first, second = (getattr(size, field, None) for size in sizes)
        if first != second:
            raise ModelError(
                f"--tuned {tuned.name} has {field} {second}, but --base {base.name} {first}; give the checkpoint that "
                "training began with"
            )


@dataclass(frozen=True)
class _PromptEnds:
    """States at the last tokens of the prompts of one model.

    Attributes:
        mean: float64 [L, D].
        halves: float64 [2, L, D], means over the requests of every other prompt.
        length: float64 [L], mean length of a state.
    """

    mean: np.ndarray
    halves: np.ndarray
    length: np.ndarray


def last_tokens(rows: Sequence[Forced]) -> torch.Tensor:
    """Where each prompt ends, int64 [B]."""
    return torch.tensor([row.start - 1 for row in rows])


def _prompt_ends(
    checkpoint: Checkpoint,
    rows: Sequence[Forced],
    second: np.ndarray,
    layers: Sequence[int],
    token_budget: int,
    meter: CostMeter,
    progress: Progress,
) -> _PromptEnds:
    model, shape = checkpoint.model, checkpoint.shape
    decoder = decoder_of(model)
    sums: np.ndarray | None = None
    lengths = np.zeros(len(layers))
    progress.start(checkpoint.name, len(rows), "requests")
    for batch in batches(rows, token_budget):
        chosen = [rows[place] for place in batch]
        last = last_tokens(chosen)
        with torch.inference_mode(), reading_layers(model, layers) as states:
            decoder(input_ids=padded_ids(chosen).to(model.device), use_cache=False)
            ends = [states[layer][torch.arange(len(chosen)), last].float().cpu().double().numpy() for layer in layers]
        stacked = np.stack(ends, axis=1)  # [B, L, D]
        if not np.isfinite(stacked).all():
            raise ModelError(f"{checkpoint.name} has states that are not finite; try --compute-dtype float32")
        if sums is None:
            sums = np.zeros((2, *stacked.shape[1:]))
        for half in (0, 1):
            sums[half] += stacked[second[batch] == half].sum(axis=0)
        lengths += np.linalg.norm(stacked, axis=2).sum(axis=0)
        meter.add(tokens=sum(row.start for row in chosen), flops=flops_of(shape, chosen))
        progress.advance(len(chosen))
    progress.finish()
    assert sums is not None
    counts = np.bincount(second.astype(np.int64), minlength=2)
    return _PromptEnds(
        mean=sums.sum(axis=0) / len(rows), halves=sums / counts[:, None, None], length=lengths / len(rows)
    )
