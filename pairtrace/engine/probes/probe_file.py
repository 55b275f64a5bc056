"""Probe files: direction files that also know how to give probabilities.

Legend: n examples, P prompts, K members of an ensemble (1 for a single probe), D width.

A probe is one tensor `{name}/{layer}`, float32 [D], which `pairtrace score` takes like any other direction, and two
more: `weight:{name}/{layer}`, float32 [K, D], and `bias:{name}/{layer}`, float64 [K]. The logit of member k for a mean
response activation x is `weight[k] @ x + bias[k]`: the standardisation of the training is folded in, so that raw
activations go in. The probability of a probe is the mean of its members' probabilities. `trained-on`, uint64 [P], holds
digests of the prompts of the training, which an evaluation leaves out.

The direction of a single probe is its weight. That of an ensemble is the mean of the members' unit weights: a bank
would be scored by its maximum, which lets any one member decide.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pairtrace.engine.directions import Direction, load_directions, read_manifest, read_tensors, save_directions
from pairtrace.errors import DirectionError, ProbeMismatchError

Role = Literal["training", "held-out", "baseline"]
ROLES: tuple[Role, ...] = ("training", "held-out", "baseline")
KIND = "probe"
_TRAINED_ON = "trained-on"


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A linear probe at one layer, or an ensemble of them.

    Attributes:
        name: of the behaviour it tells; no whitespace, slash or colon.
        layer: residual layer l, the stream after l blocks.
        role: "training" (may be trained against), "held-out" (for monitoring only), or "baseline" (the difference of
            the class means, scaled to probabilities).
        weight: float32 [K, D], in units of one over activation.
        bias: float64 [K].
        origin: the file it came from.
        model_fingerprint, tokenizer_fingerprint, template_fingerprint: of what its activations were read with.
    """

    name: str
    layer: int
    role: Role
    weight: np.ndarray
    bias: np.ndarray
    origin: str = "this run"
    model_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    template_fingerprint: str | None = None

    def __post_init__(self) -> None:
        assert self.weight.ndim == 2 and self.weight.dtype == np.float32, (self.weight.shape, self.weight.dtype)
        assert self.bias.shape == (len(self.weight),) and self.bias.dtype == np.float64, self.bias.shape
        if not np.isfinite(self.weight).all() or not np.isfinite(self.bias).all():
            raise DirectionError(f"{self.origin}: the probe {self.name!r}, layer {self.layer}, holds NaN or infinity")

    @property
    def members(self) -> int:
        """K."""
        return len(self.weight)

    @property
    def width(self) -> int:
        """D."""
        return int(self.weight.shape[1])

    @property
    def direction(self) -> np.ndarray:
        """float32 [D]: the weight of a single probe as it is, of an ensemble the mean of its unit weights."""
        if self.members == 1:
            single: np.ndarray = self.weight[0]
            return single
        wide = self.weight.astype(np.float64)
        mean: np.ndarray = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).mean(axis=0)
        rounded: np.ndarray = mean.astype(np.float32)
        return rounded

    def logits(self, activations: np.ndarray) -> np.ndarray:
        """float64 [n, K] of mean response activations, float [n, D]; a row that is not finite gives NaN."""
        # Not a float32 product: weights of near-constant columns are large and cancel against the bias.
        result: np.ndarray = activations.astype(np.float64) @ self.weight.T.astype(np.float64) + self.bias
        return result

    def probabilities(self, activations: np.ndarray) -> np.ndarray:
        """float64 [n] of mean response activations, float [n, D]: the mean over the members."""
        result: np.ndarray = sigmoid(self.logits(activations)).mean(axis=1)
        return result


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow, float64, any shape."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


def save_probes(
    path: str | Path, probes: Sequence[Probe], manifest: dict[str, Any], *, trained_on: np.ndarray | None = None
) -> None:
    """Write a probe file, complete or not at all.

    Args:
        path: of the safetensors file.
        probes: at least one; names and layers together are unique, and all come from one model, tokenizer and template.
        manifest: further entries: how they were trained, and their figures.
        trained_on: uint64 [P], digests of the prompts that they were trained on.

    Raises:
        ConfigError: the file cannot be written.
        DirectionError: a weight is zero, or the members of an ensemble cancel.
    """
    directions = [
        Direction(
            name=probe.name,
            layer=probe.layer,
            values=probe.direction[None],
            kind="vector",
            origin=str(path),
            model_fingerprint=probe.model_fingerprint,
            tokenizer_fingerprint=probe.tokenizer_fingerprint,
            template_fingerprint=probe.template_fingerprint,
        )
        for probe in probes
    ]
    tensors = {f"weight:{probe.name}/{probe.layer}": probe.weight for probe in probes}
    tensors |= {f"bias:{probe.name}/{probe.layer}": probe.bias for probe in probes}
    tensors[_TRAINED_ON] = np.empty(0, np.uint64) if trained_on is None else trained_on
    roles = {probe.name: probe.role for probe in probes}
    assert all(roles[probe.name] == probe.role for probe in probes), "a name has one role"
    save_directions(path, directions, {"kind": KIND, "roles": roles, **manifest}, tensors=tensors)


def load_probes(
    path: str | Path,
    *,
    layers: Collection[int] | None = None,
    names: Collection[str] | None = None,
    roles: Collection[Role] | None = None,
    width: int | None = None,
    model_fingerprint: str | None = None,
    tokenizer_fingerprint: str | None = None,
) -> list[Probe]:
    """Read a probe file.

    Args:
        path: written by `save_probes`.
        layers: only these; all of them have to be there.
        names: only these; all of them have to be there.
        roles: only these.
        width: D that is needed.
        model_fingerprint: of the model whose activations will be given to the probes; None for any model.
        tokenizer_fingerprint: of its tokenizer; None for any.

    Returns:
        The probes, at least one, by name and layer.

    Raises:
        DirectionError: the file cannot be read, or it is a direction file without probes.
        ProbeMismatchError: it holds no such layer, name or role, or its probes belong to another model, tokenizer or
            width.
    """
    manifest = read_manifest(path) if Path(path).suffix == ".safetensors" else {}
    if manifest.get("kind") != KIND or not isinstance(manifest.get("roles"), dict):
        raise DirectionError(f"{path} is not a probe file (a direction alone gives no probability); make one with "
                             "pairtrace probe train")  # fmt: skip
    tensors = read_tensors(path)
    found = [_probe(path, direction, tensors, manifest["roles"]) for direction in load_directions(path, note=False)]
    lost = sorted(
        {name.removeprefix("weight:") for name in tensors if name.startswith("weight:")}
        - {f"{probe.name}/{probe.layer}" for probe in found}
    )
    if lost:
        raise DirectionError(f"{path} is damaged: the probe {lost[0]} has weights and no direction")
    _require_known(path, "layer", layers, {probe.layer for probe in found})
    _require_known(path, "probe", names, {probe.name for probe in found})
    _require_known(path, "probe of the role", roles, {probe.role for probe in found})
    kept = [
        probe
        for probe in found
        if (layers is None or probe.layer in layers)
        and (names is None or probe.name in names)
        and (roles is None or probe.role in roles)
    ]
    if not kept:
        have = ", ".join(f"{probe.name} ({probe.role}) at layer {probe.layer}" for probe in found)
        asked = f"layers {layers}, names {names}, roles {roles}"
        raise ProbeMismatchError(f"{path} holds no probe that fits all of what was asked for", asked, have)
    for probe in kept:
        for what, actual, needed in (
            ("width", probe.width, width),
            ("model fingerprint", probe.model_fingerprint, model_fingerprint),
            ("tokenizer fingerprint", probe.tokenizer_fingerprint, tokenizer_fingerprint),
        ):
            if None not in (actual, needed) and actual != needed:
                raise ProbeMismatchError(f"{path}: the probe {probe.name!r} belongs to another {what}", needed, actual)
    return kept


def trained_prompts(path: str | Path) -> np.ndarray:
    """uint64 [P]: digests of the prompts that the probes of a file were trained on (`examples.content_digest`).

    Raises:
        DirectionError: the file cannot be read, or does not say.
    """
    digests = read_tensors(path).get(_TRAINED_ON)
    if digests is None or digests.dtype != np.uint64:
        raise DirectionError(f"{path} is damaged: it does not say which prompts its probes were trained on")
    return digests


def _probe(path: str | Path, direction: Direction, tensors: dict[str, np.ndarray], roles: dict[str, Any]) -> Probe:
    key = f"{direction.name}/{direction.layer}"
    weight, bias, role = tensors.get(f"weight:{key}"), tensors.get(f"bias:{key}"), roles.get(direction.name)
    width = direction.values.shape[1]
    if (
        weight is None
        or bias is None
        or weight.dtype != np.float32
        or bias.dtype != np.float64
        or bias.ndim != 1
        or weight.shape != (len(bias), width)
        or role not in ROLES
    ):
        raise DirectionError(
            f"{path} is damaged: {key} has no weights (float32 [K, {width}]), biases (float64 [K]) and role that go "
            "together"
        )
    assert direction.layer is not None
    return Probe(
        name=direction.name,
        layer=direction.layer,
        role=role,
        weight=weight,
        bias=bias,
        origin=str(path),
        model_fingerprint=direction.model_fingerprint,
        tokenizer_fingerprint=direction.tokenizer_fingerprint,
        template_fingerprint=direction.template_fingerprint,
    )


def _require_known(path: str | Path, what: str, wanted: Collection[Any] | None, known: set[Any]) -> None:
    absent = sorted(set(wanted or ()) - known)
    if absent:
        have = ", ".join(map(str, sorted(known)))
        raise ProbeMismatchError(f"{path} holds no {what} {absent[0]}", ", ".join(map(str, absent)), have)
