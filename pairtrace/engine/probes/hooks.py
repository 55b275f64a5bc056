"""The residual stream of a model that runs as it is: read at some layers, changed at one, or everywhere.

Layer l is the stream after l blocks: 0 is the embedding output, the last one comes before the final norm. The model
is the same afterwards, whatever happens inside. Legend: B sequences, T tokens, D width.

    with reading_layers(model, (20,)) as states:
        loss = model(**batch).loss + weight * term(states, response_mask).mean()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from pairtrace.engine.architectures import FAMILIES, check_layers
from pairtrace.errors import UnsupportedModelError

Action = Callable[[torch.Tensor], torch.Tensor | None]
"""Gets a hidden state; what it returns takes its place, unless that is None."""

States = dict[int, torch.Tensor]
"""Residual stream by layer, [B, T, D] each, in the dtype of the model."""


@contextmanager
def reading_layers(model: Any, layers: Sequence[int]) -> Iterator[States]:
    """Keep the residual stream of the latest forward pass.

    The states are part of the pass's graph: what is computed of them is differentiated through the model. Gradient
    checkpointing of transformers may be on. A state is replaced by the next forward pass, and dropped at the end, so
    that no graph is kept alive.

    Args:
        model: a transformers decoder with or without its head, also inside peft or
            DistributedDataParallel.
        layers: from 0 to the number of blocks.

    Yields:
        The states; empty until the model has run.

    Raises:
        LayerError: a layer is outside the model.
        UnsupportedModelError: of this architecture it is not known where its blocks are.
    """
    states: States = {}
    handles = _hooks(model, {layer: partial(_keep, states, layer) for layer in layers})
    try:
        yield states
    finally:
        _remove(handles)
        states.clear()


@contextmanager
def changed_layer(model: Any, layer: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Put something else in the place of the residual stream at one layer, in every forward pass inside.

    Args:
        model, layer: as for `reading_layers`.
        change: gives the new state, of the shape, dtype and device of the old one, [B, T, D], which it leaves as it is.

    Raises:
        LayerError, UnsupportedModelError: as for `reading_layers`.
    """
    handles = _hooks(model, {layer: change})
    try:
        yield
    finally:
        _remove(handles)


@contextmanager
def changed_everywhere(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Put something else in the place of the residual stream wherever something reads it, in every forward pass inside.

    That is at every layer, the embedding output and the last one included, and inside each block, where the stream
    between attention and MLP is given to the MLP. What the block adds to it stays as it was until the block ends, so a
    projection, which may be done twice, acts as if nothing had ever written what it takes away.

    Args:
        model, change: as for `changed_layer`.

    Raises:
        UnsupportedModelError: as for `reading_layers`.
    """
    decoder = decoder_of(model)
    handles = _hooks(model, dict.fromkeys(range(decoder.config.num_hidden_layers + 1), change))
    family = FAMILIES[decoder.config.model_type]
    if family.middle is not None:
        handles += [
            getattr(block, family.middle).register_forward_pre_hook(_before(change), with_kwargs=True)
            for block in getattr(decoder, family.blocks)
        ]
    try:
        yield
    finally:
        _remove(handles)


def decoder_of(model: Any) -> Any:
    """The decoder without wrappers and head: the module that holds the blocks.

    Raises:
        UnsupportedModelError: of this architecture it is not known where its blocks are, or the model is compiled.
    """
    inner = getattr(model, "module", model)  # DistributedDataParallel
    if hasattr(inner, "_orig_mod"):
        raise UnsupportedModelError(
            "a model that torch.compile has compiled may ignore what is hooked to its blocks; give the model itself"
        )
    if hasattr(inner, "get_base_model"):  # peft
        inner = inner.get_base_model()
    require_blocks(inner.config)
    return getattr(inner, inner.base_model_prefix, inner)


def require_blocks(config: Any) -> None:
    """Check by its configuration that a model can be read and changed.

    Raises:
        UnsupportedModelError: of this architecture it is not known where its blocks are.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported: it is not known where its blocks are; supported are "
            f"{', '.join(sorted(FAMILIES))}"
        )


def _keep(states: States, layer: int, hidden: torch.Tensor) -> None:
    states[layer] = hidden


def _hooks(model: Any, actions: Mapping[int, Action]) -> list[RemovableHandle]:
    decoder = decoder_of(model)
    check_layers(tuple(actions), decoder.config)
    blocks = getattr(decoder, FAMILIES[decoder.config.model_type].blocks)
    return [
        blocks[0].register_forward_pre_hook(_before(action), with_kwargs=True)
        if layer == 0
        else blocks[layer - 1].register_forward_hook(_after(action))
        for layer, action in actions.items()
    ]


def _before(action: Action) -> Callable[..., Any]:
    """The action on what a block is given."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = action(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    return hook


def _after(action: Action) -> Callable[..., Any]:
    """The action on what a block returns, alone or as the first of several."""

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        several = isinstance(output, tuple)
        changed = action(output[0] if several else output)
        return (changed, *output[1:]) if several and changed is not None else changed

    return hook


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
