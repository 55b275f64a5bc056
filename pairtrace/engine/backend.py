"""The transformers back end: pairs in, mean response activations out, one truncated forward pass per pack.

Legend: N pairs, L layers, D width, T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pairtrace.engine.architectures import Family, check_layers, family_of, truncated_config
from pairtrace.engine.checkpoint import (
    load_config,
    load_model,
    model_fingerprint,
    resolve_checkpoint,
    resolve_device,
)
from pairtrace.engine.cost import CostMeter
from pairtrace.engine.flops import ModelShape
from pairtrace.engine.packed_model import PackedModel, check_token_budget
from pairtrace.engine.packing import (
    CHOSEN,
    REJECTED,
    SHARED,
    Pack,
    build_pack,
    packed_flops,
)
from pairtrace.engine.rendering import RenderedPair
from pairtrace.errors import ConfigError
from pairtrace.kernels.pooling import segment_mean

# Packs of about a thousand tokens keep a CPU's caches warm; a GPU wants enough rows to fill its matrix units.
DEFAULT_TOKEN_BUDGET = {"cpu": 1024, "cuda": 32768}

OnPack = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Pooled:
    """Mean response activations of N pairs at L layers.

    Attributes:
        chosen: float32 [N, L, D], on the host.
        rejected: float32 [N, L, D], on the host.
        failed: positions of pairs that did not fit into memory even alone; their rows are zero.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    failed: tuple[int, ...] = ()


class Backend(Protocol):
    """Anything that turns rendered pairs into mean response activations."""

    layers: tuple[int, ...]
    width: int
    compute_dtype: str

    def pool(self, pairs: Sequence[RenderedPair], on_pack: OnPack | None = None) -> Pooled:
        """Return the pooled activations of `pairs` in order; `on_pack(pairs, tokens)` hears of every pack."""


class HFBackend(PackedModel):
    """A decoder cut at the deepest layer asked for, run over packs of pairs.

    Attributes:
        layers: residual layers that are read; `l` is the stream after `l` blocks, 0 the embedding output.
        width: D.
        fingerprint: fingerprint of the weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        family: Family,
        layers: tuple[int, ...],
        *,
        token_budget: int | None = None,
        fingerprint: str = "",
        meter: CostMeter | None = None,
    ) -> None:
        setattr(model, family.final_norm, torch.nn.Identity())
        super().__init__(model, token_budget, DEFAULT_TOKEN_BUDGET)
        config: Any = model.config
        self.layers = layers
        self.width = int(config.hidden_size)
        self.fingerprint = fingerprint
        self._meter = meter
        self._pack: Pack | None = None
        self._means: dict[int, torch.Tensor] = {}
        self._observe(getattr(model, family.blocks))

    @classmethod
    def load(
        cls,
        model: str | Path,
        layers: Sequence[int],
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_length: int | None = None,
        token_budget: int | None = None,
        fingerprint: str | None = None,
        meter: CostMeter | None = None,
    ) -> HFBackend:
        """Load the first `max(layers)` blocks of a checkpoint; deeper weights and the LM head are never read.

        Args:
            model: checkpoint directory or hub id.
            layers: residual layers to read, each from 0 to the number of blocks.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: dtype of the forward pass, "auto" for the checkpoint's own.
            max_length: longest sequence that will come, in tokens.
            token_budget: tokens per pack; None for the device's default.
            fingerprint: the weights' fingerprint if already known; computed otherwise.
            meter: counts tokens and operations.

        Raises:
            LayerError: a layer is outside the model.
            UnsupportedModelError: the architecture is not reproduced exactly.
            ModelError: weights are missing or damaged.
            ConfigError: the device, dtype or budget cannot be used.
        """
        from transformers import AutoModel

        if not layers:
            raise ConfigError("no layer was given; expected at least one, for example --layers 20")
        check_token_budget(token_budget)
        path = resolve_checkpoint(model)
        config = load_config(path)
        wanted = tuple(sorted(set(layers)))
        check_layers(wanted, config)
        family = family_of(config, max_length)
        # The final norm is replaced, so a checkpoint may lack it.
        expendable = frozenset({f"{family.final_norm}.weight", f"{family.final_norm}.bias"})
        base = load_model(AutoModel, path, truncated_config(config, wanted[-1]), dtype, expendable=expendable)
        return cls(
            base.to(resolve_device(device)),
            family,
            wanted,
            token_budget=token_budget,
            fingerprint=model_fingerprint(path) if fingerprint is None else fingerprint,
            meter=meter,
        )

    def pool(self, pairs: Sequence[RenderedPair], on_pack: OnPack | None = None) -> Pooled:
        """Run `pairs` in packs and return their mean response activations, in order.

        Running out of memory halves the token budget and goes on; a pair that does not fit alone is reported in
        `Pooled.failed`.

        Args:
            pairs: N rendered pairs.
            on_pack: called with (pairs, tokens) after every pack.

        Raises:
            ModelError: a token is outside the model's embedding.
        """
        shape = (len(pairs), len(self.layers), self.width)
        chosen = torch.zeros(shape, dtype=torch.float32, device=self.device)
        rejected = torch.zeros(shape, dtype=torch.float32, device=self.device)
        failed: list[int] = []

        def forward(members: range) -> tuple[torch.Tensor, torch.Tensor]:
            return self._forward(build_pack(pairs, members, self.device))

        for members, tokens, means in self._run_packs(pairs, forward):
            if means is None:
                failed += members
            else:
                chosen[members.start : members.stop], rejected[members.start : members.stop] = means
            if self._meter is not None:
                self._meter.add(tokens=tokens, flops=self._flops(pairs, members))
            if on_pack is not None:
                on_pack(len(members), tokens)
        return Pooled(chosen=chosen.cpu().numpy(), rejected=rejected.cpu().numpy(), failed=tuple(failed))

    def _flops(self, pairs: Sequence[RenderedPair], members: range) -> float:
        config: Any = self._model.config
        shape = ModelShape.from_config(config)
        return sum(packed_flops(pairs[index], shape, shape.blocks) for index in members)

    @torch.inference_mode()
    def _forward(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        self._pack = pack
        try:
            self._model(
                input_ids=pack.input_ids[None],
                position_ids=pack.plan.positions[None],
                use_cache=False,
                pair_plan=pack.plan,
            )
            means = torch.stack([self._means[layer] for layer in self.layers], dim=1)
        finally:
            self._pack = None
            self._means.clear()
        means = means.view(len(pack.pairs), 3, len(self.layers), self.width)
        shared = means[:, SHARED]
        weight = pack.shared_weight[:, :, None, None]
        sides = []
        for number, side in enumerate((means[:, CHOSEN], means[:, REJECTED])):
            share = weight[:, number]
            # Where nothing of the response is shared the leaf's mean is the answer, to the bit.
            sides.append(torch.where(share > 0, side + share * (shared - side), side))
        return sides[0], sides[1]

    def _observe(self, blocks: torch.nn.ModuleList) -> None:
        """Pool each wanted layer as soon as it is computed, so that no hidden state outlives its block."""
        for layer in self.layers:
            if layer == 0:

                def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                    self._keep(0, args[0] if args else kwargs["hidden_states"])

                blocks[0].register_forward_pre_hook(before, with_kwargs=True)
            else:

                def after(module: torch.nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                    self._keep(layer, output[0] if isinstance(output, tuple) else output)

                blocks[layer - 1].register_forward_hook(after)

    def _keep(self, layer: int, hidden: torch.Tensor) -> None:
        assert self._pack is not None and hidden.shape[0] == 1
        self._means[layer] = segment_mean(hidden[0], self._pack.segment_of_token, 3 * len(self._pack.pairs))
