"""The arms of a steering run: which vector, at which layer, added how strongly or projected out.

Legend: B rows, T tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from pairtrace.engine.directions import Direction, load_directions, read_manifest, read_tensors
from pairtrace.engine.steering.config import Positions, SteerConfig
from pairtrace.errors import ConfigError, DirectionError, LayerError

Mode = Literal["none", "add", "ablate"]
# Tensors of a direction file, with the layer behind; a direction's name has no colon.
BASE_STATE = "base:"


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """One way to steer.

    Attributes:
        direction: name of the behaviour, or "random-1" and so on; "" for the unsteered model.
        control: whether it is a random direction.
        layer: residual layer; None for the unsteered model.
        mode: "none" (unsteered), "add" or "ablate".
        everywhere: whether it acts at all layers, and not at `layer`, which the direction was made for, alone.
        scale: in units of the mean norm; None where nothing is added.
        unit: float64 [D], the direction at length 1; None for the unsteered model.
        left: component along `unit` that a projection leaves, in the units of the activations; None for nothing.
    """

    direction: str = ""
    control: bool = False
    layer: int | None = None
    mode: Mode = "none"
    everywhere: bool = False
    scale: float | None = None
    unit: np.ndarray | None = None
    left: float | None = None

    @property
    def name(self) -> str:
        """Unique within a run."""
        if self.mode == "none":
            return "unsteered"
        where, to = " at all layers" if self.everywhere else "", "" if self.left is None else " to the base's"
        ablated = f"ablated{where}{to}"
        what = ablated if self.mode == "ablate" else f"{self.scale:+g}"
        return f"{self.direction}, layer {self.layer}, {what}"

    def identity(self, norms: Mapping[int, float], positions: Positions) -> dict[str, Any]:
        """What decides the answers besides the model: vector, layer, mode and length, as plain JSON values."""
        if self.unit is None or self.layer is None:
            return {"mode": self.mode}
        length = None if self.scale is None else self.scale * norms[self.layer]
        left = {} if self.left is None else {"left": self.left}
        return {
            **left,
            "mode": self.mode,
            "layer": "all" if self.everywhere else self.layer,
            "positions": positions,
            "length": length,
            "unit": hashlib.sha256(self.unit.astype("<f8").tobytes()).hexdigest(),
        }


class Steering:
    """What is done to a hidden state; for `hooks.changed_layer` and `hooks.changed_everywhere`.

    Args:
        unit: float64 [D], of length 1.
        length: of the vector that is added; None projects the direction out.
        positions: see `SteerConfig`.
        left: component along the direction that the projection leaves.
    """

    def __init__(self, unit: np.ndarray, length: float | None, positions: Positions, left: float | None = None) -> None:
        self._unit = torch.from_numpy(unit.astype(np.float32))
        self._length = length
        self._positions = positions
        self._left = left or 0.0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The steered state, [B, T, D] like `hidden`; computed in float32.

        More than one token at a time is a prompt, padded on the left: its last token is in the last column of all rows.
        (A chat template leaves no prompt of one token.)
        """
        self._unit = self._unit.to(hidden.device)
        if hidden.shape[1] == 1 and self._positions == "prompt_end":
            return hidden
        if hidden.shape[1] == 1 or self._positions == "all":
            return self._changed(hidden)
        steered = hidden.clone()
        steered[:, -1] = self._changed(hidden[:, -1])
        return steered

    def _changed(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        if self._length is None:
            return (wide - (wide @ self._unit - self._left)[..., None] * self._unit).to(states.dtype)
        return (wide + self._length * self._unit).to(states.dtype)


def load_vectors(config: SteerConfig, tokenizer_fingerprint: str, width: int) -> list[Direction]:
    """The vector to steer along, one per layer, ascending.

    Raises:
        DirectionError: the file has no vector of this name, another width or tokenizer, or does not name its layers.
        LayerError: it does not hold a layer.
        ConfigError: it holds several vectors and none was named.
    """
    found = load_directions(config.directions, width=width, note=False)
    for one in found:
        if one.tokenizer_fingerprint not in (None, tokenizer_fingerprint):
            raise DirectionError(
                f"{config.directions}: {one.name!r} was made with the tokenizer with fingerprint "
                f"{one.tokenizer_fingerprint}, but that of {config.model} has {tokenizer_fingerprint}"
            )
    is_file = config.directions.endswith(".safetensors")
    roles = read_manifest(config.directions).get("roles", {}) if is_file else {}
    if not isinstance(roles, dict):
        raise DirectionError(f"{config.directions}: the manifest is damaged: roles is {roles!r}")
    vectors = [one for one in found if one.kind == "vector"]
    if config.behavior is not None:
        chosen = [one for one in vectors if one.name == config.behavior]
        if not chosen:
            kinds = ", ".join(sorted({f"{one.name} ({one.kind})" for one in found}))
            raise DirectionError(
                f"{config.directions} holds no vector {config.behavior!r} to steer along; it has: {kinds}"
            )
    else:
        chosen = [one for one in vectors if roles.get(one.name, "training") == "training"]
        if len({one.name for one in chosen}) != 1:
            have = ", ".join(sorted({one.name for one in vectors})) or "none"
            raise ConfigError(
                f"{config.directions} has not exactly one vector to steer along; choose one with --behavior: {have}"
            )
    by_layer = {one.layer: one for one in chosen if one.layer is not None}
    if not by_layer:
        raise DirectionError(
            f"{config.directions} does not say which layer it belongs to; name the tensor NAME/LAYER in a .safetensors "
            "file"
        )
    wanted = sorted(by_layer if config.layers is None else set(config.layers))
    absent = [layer for layer in wanted if layer not in by_layer]
    if absent:
        raise LayerError(
            f"{config.directions} holds no layer {absent[0]} of {chosen[0].name}; its layers are {sorted(by_layer)}"
        )
    return [by_layer[layer] for layer in wanted]


def _base_states(config: SteerConfig, vectors: Sequence[Direction]) -> dict[int | None, np.ndarray]:
    """By layer, the mean state of the base model at the end of the prompts, float64 [D].

    Raises:
        DirectionError: the file does not hold them.
    """
    tensors = read_tensors(config.directions) if config.directions.endswith(".safetensors") else {}
    keys = {vector.layer: f"{BASE_STATE}{vector.layer}" for vector in vectors}
    for key in keys.values():
        if key not in tensors:
            raise DirectionError(
                f"{config.directions} does not hold the base model's states, which --ablate-to base needs; "
                "`pairtrace shift` makes a file that does"
            )
    return {layer: tensors[key].astype(np.float64) for layer, key in keys.items()}


def arms_of(config: SteerConfig, vectors: Sequence[Direction]) -> list[Arm]:
    """The unsteered model first, then layer by layer the direction and its controls.

    Raises:
        DirectionError: the direction file does not hold what a projection is to leave.
    """
    arms = [Arm()]
    base = _base_states(config, vectors) if config.ablate_to == "base" else {}
    for vector in vectors:
        assert vector.layer is not None
        values = vector.values[0].astype(np.float64)
        lines = [(vector.name, False, values)]
        for number in range(1, config.controls + 1):
            rng = np.random.default_rng([config.seed, vector.layer, number])
            lines.append((f"random-{number}", True, rng.normal(size=len(values))))
        for name, control, line in lines:
            unit = line / np.linalg.norm(line)
            steps: list[tuple[Mode, float | None]] = [("add", scale) for scale in config.scales]
            steps += [("ablate", None)] if config.ablate else []
            arms += [
                Arm(
                    direction=name,
                    control=control,
                    layer=vector.layer,
                    mode=mode,
                    everywhere=mode == "ablate" and config.ablate_layers == "all",
                    scale=scale,
                    unit=unit,
                    left=float(base[vector.layer] @ unit) if base and mode == "ablate" else None,
                )
                for mode, scale in steps
            ]
    return arms
