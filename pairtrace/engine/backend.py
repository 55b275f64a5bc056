"""The transformers back end: pairs in, mean response activations out, one truncated forward pass per pack.

Legend: N pairs, L layers, D width, T tokens of a pack.
"""

from __future__ import annotations

import logging
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
from pairtrace.engine.memory import is_out_of_memory
from pairtrace.engine.packing import (
    CHOSEN,
    REJECTED,
    SHARED,
    Pack,
    build_pack,
    next_members,
    packed_flops,
    packed_tokens,
)
from pairtrace.engine.rendering import RenderedPair
from pairtrace.errors import ConfigError, ModelError, UnsupportedModelError
from pairtrace.kernels.pooling import segment_mean
from pairtrace.kernels.segment_attention import SegmentPlan, segment_attention

logger = logging.getLogger(__name__)

ATTENTION_NAME = "pairtrace_tree"
# Packs of about a thousand tokens keep a CPU's caches warm; a GPU wants enough rows to fill its matrix units.
DEFAULT_TOKEN_BUDGET = {"cpu": 1024, "cuda": 32768}
# Passed by transformers to every attention function, without meaning for a forward pass over whole sequences.
_INERT_KEYWORDS = frozenset({"position_ids", "cache_position", "output_attentions", "use_cache", "is_causal"})

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


def _tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    pair_plan: SegmentPlan | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; refuses whatever it would have to ignore."""
    if pair_plan is None or attention_mask is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not hand the pack's plan to its attention, or builds a mask of its own"
        )
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _INERT_KEYWORDS)
    if unknown:
        raise UnsupportedModelError(f"{type(module).__name__} uses attention features not reproduced here: {unknown}")
    assert dropout == 0.0
    output = segment_attention(
        query,
        key,
        value,
        pair_plan,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return output.transpose(1, 2), None


def register_attention() -> None:
    """Make the attention of packs known to transformers, under `ATTENTION_NAME`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _tree_attention)


class HFBackend:
    """A decoder cut at the deepest layer asked for, run over packs of pairs.

    Attributes:
        layers: residual layers that are read; `l` is the stream after `l` blocks, 0 the embedding output.
        width: D.
        compute_dtype: name of the dtype of the forward pass.
        fingerprint: fingerprint of the weights.
        token_budget: tokens per pack; halved whenever memory runs out.
        out_of_memory: how many times it was halved.
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
        register_attention()
        config: Any = model.config
        config._attn_implementation = ATTENTION_NAME
        self.layers = layers
        self.width = int(config.hidden_size)
        self.fingerprint = fingerprint
        self.out_of_memory = 0
        self._meter = meter
        parameter = next(model.parameters())
        self.device = parameter.device
        self.compute_dtype = str(parameter.dtype).removeprefix("torch.")
        self.token_budget = token_budget or DEFAULT_TOKEN_BUDGET.get(self.device.type, 1024)
        setattr(model, family.final_norm, torch.nn.Identity())
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]  # a transformers model has it
        self._embedded = int(embedding.num_embeddings)
        self._model = model.eval().requires_grad_(False)
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
        if token_budget is not None and token_budget < 1:
            raise ConfigError(f"the token budget is {token_budget}; expected at least 1")
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
        self._check_ids(pairs)
        costs = [packed_tokens(pair) for pair in pairs]
        shape = (len(pairs), len(self.layers), self.width)
        chosen = torch.zeros(shape, dtype=torch.float32, device=self.device)
        rejected = torch.zeros(shape, dtype=torch.float32, device=self.device)
        failed: list[int] = []
        start = 0
        while start < len(pairs):
            members = next_members(costs, start, self.token_budget)
            tokens = sum(costs[members.start : members.stop])
            means = self._forward_or_none(pairs, members)
            if means is not None:
                chosen[start : members.stop], rejected[start : members.stop] = means
            elif len(members) > 1:
                self.token_budget = max(1, min(self.token_budget, tokens) // 2)
                self.out_of_memory += 1
                logger.warning("out of memory: the token budget is now %d", self.token_budget)
                continue
            else:
                logger.warning("row %d does not fit into memory, even alone", pairs[start].row)
                failed.append(start)
            start = members.stop
            if self._meter is not None:
                self._meter.add(tokens=tokens, flops=self._flops(pairs, members))
            if on_pack is not None:
                on_pack(len(members), tokens)
        return Pooled(chosen=chosen.cpu().numpy(), rejected=rejected.cpu().numpy(), failed=tuple(failed))

    def _flops(self, pairs: Sequence[RenderedPair], members: range) -> float:
        config: Any = self._model.config
        shape = ModelShape.from_config(config)
        return sum(packed_flops(pairs[index], shape, shape.blocks) for index in members)

    def _check_ids(self, pairs: Sequence[RenderedPair]) -> None:
        """On a GPU an id outside the embedding would end the process instead of raising."""
        for pair in pairs:
            largest = max(int(pair.chosen_ids.max()), int(pair.rejected_ids.max()))
            if largest >= self._embedded:
                raise ModelError(
                    f"row {pair.row} holds token {largest}, but the model embeds {self._embedded} tokens: "
                    "tokenizer and model do not belong together"
                )

    def _forward_or_none(
        self, pairs: Sequence[RenderedPair], members: range
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Pooled (chosen, rejected) of one pack, each float32 [P, L, D]; None when memory ran out."""
        try:
            return self._forward(build_pack(pairs, members, self.device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self._means.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

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
        finally:
            self._pack = None
        means = torch.stack([self._means.pop(layer) for layer in self.layers], dim=1)
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
