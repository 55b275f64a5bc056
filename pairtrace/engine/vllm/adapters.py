"""LoRA adapters: what vLLM loads beside a model instead of a checkpoint of its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairtrace.engine.checkpoint import file_digest, model_fingerprint
from pairtrace.errors import ModelError

# Ranks that vLLM makes room for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_WEIGHTS = "adapter_model.safetensors"
# Where the adapter was made and how it was trained; they do not change what it computes.
_VOLATILE = (
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "init_lora_weights",
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        path: its directory.
        rank: of its matrices.
        base: the checkpoint that it was trained on, as its configuration names it; "" where it does not.
        settings: its configuration.
    """

    path: Path
    rank: int
    base: str
    settings: dict[str, Any]

    @property
    def room(self) -> int:
        """The rank that vLLM has to make room for.

        Raises:
            ModelError: it makes no room for this one.
        """
        enough = [rank for rank in _RANKS if rank >= self.rank]
        if not enough:
            raise ModelError(
                f"{self.path} has rank {self.rank}, but vLLM holds adapters of up to {_RANKS[-1]}; merge it"
            )
        return enough[0]

    def fingerprint(self, base: str) -> str:
        """SHA-256 (hex) over the adapter's weights and configuration and over the fingerprint of its model."""
        described = {name: value for name, value in self.settings.items() if name not in _VOLATILE}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        digest.update(f"{file_digest(self.path / _WEIGHTS)}\n{model_fingerprint(base)}".encode())
        return digest.hexdigest()


def find_adapter(model: str, base: str | None = None) -> Adapter | None:
    """The adapter in a directory; None where there is none, or a whole checkpoint beside it.

    Args:
        model: directory or hub id.
        base: the checkpoint that it will be used with, where that is known.

    Raises:
        ModelError: the adapter is damaged, no plain LoRA, in a pickled file, or was trained on another checkpoint.
    """
    path = Path(model).expanduser()
    description = path / "adapter_config.json"
    if not description.is_file() or (path / "config.json").is_file():
        return None
    try:
        settings = json.loads(description.read_text(encoding="utf-8"))
        kind, rank = settings["peft_type"], int(settings["r"])
        trained_on = settings.get("base_model_name_or_path") or ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{description} is damaged: {error!r}") from error
    if kind != "LORA" or settings.get("use_dora") or settings.get("modules_to_save"):
        raise ModelError(
            f"{path} is no plain LoRA adapter (peft_type {kind}, use_dora {settings.get('use_dora')}, modules_to_save "
            f"{settings.get('modules_to_save')}); merge it first (peft: merge_and_unload, then save)"
        )
    if not (path / _WEIGHTS).is_file():
        raise ModelError(f"{path} has no {_WEIGHTS}; pickled adapters are never read")
    if (
        base is not None
        and trained_on
        and Path(trained_on).is_dir()
        and Path(base).is_dir()
        and not Path(trained_on).samefile(base)
        and model_fingerprint(trained_on) != model_fingerprint(base)
    ):
        raise ModelError(f"the adapter {path} was trained on {trained_on}, whose weights are not those of {base}")
    return Adapter(path, rank, str(trained_on), settings)


def fingerprint_of(model: str, base: str) -> str:
    """Fingerprint of a checkpoint, or of an adapter of `base`.

    Raises:
        ModelError: it is neither, or damaged.
    """
    adapter = find_adapter(model, base)
    return model_fingerprint(model) if adapter is None else adapter.fingerprint(base)
