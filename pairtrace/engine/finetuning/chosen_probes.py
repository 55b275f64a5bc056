"""Which probes of a file a run trains against, and which ones it only looks at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pairtrace.engine.directions import read_manifest
from pairtrace.engine.finetuning.config import FinetuneConfig
from pairtrace.engine.probes.probe_file import Probe, load_probes
from pairtrace.engine.tables import file_digest
from pairtrace.errors import ProbeMismatchError


@dataclass(frozen=True, kw_only=True)
class ChosenProbes:
    """The probes of a run.

    Attributes:
        trained: in the loss, or in the choice of pairs; empty with another signal than the probe.
        watched: looked at, never trained against.
        digest: SHA-256 of the file, hex; "" without one.
    """

    trained: tuple[Probe, ...] = ()
    watched: tuple[Probe, ...] = ()
    digest: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """Of all of them, ascending."""
        return tuple(sorted({probe.layer for probe in (*self.trained, *self.watched)}))

    @classmethod
    def of(cls, config: FinetuneConfig, model_fingerprint: str, tokenizer_fingerprint: str) -> ChosenProbes:
        """Read the file of `config`.

        Raises:
            DirectionError: it is no probe file, or damaged.
            ProbeMismatchError: its probes belong to another model, or it has no such layer, or no training probe.
        """
        if config.probe is None:
            return cls()
        layers = config.probe_layers or best_layers(config.probe)
        probes = load_probes(
            config.probe,
            layers=layers,
            model_fingerprint=model_fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )
        trained = tuple(probe for probe in probes if probe.role == "training" and config.signal == "probe")
        if config.signal == "probe" and not trained:
            have = ", ".join(f"{probe.name} ({probe.role})" for probe in probes)
            raise ProbeMismatchError(f"{config.probe} has nothing to train against", "a training probe", have)
        return cls(
            trained=trained,
            watched=tuple(probe for probe in probes if probe not in trained),
            digest=file_digest([Path(config.probe)]),
        )


def best_layers(path: str) -> tuple[int, ...] | None:
    """The layer that its training found best; None, for all of them, where the file does not say."""
    training = read_manifest(path).get("training") if path.endswith(".safetensors") else None
    best = training.get("best_layer") if isinstance(training, dict) else None
    return (best,) if isinstance(best, int) else None
