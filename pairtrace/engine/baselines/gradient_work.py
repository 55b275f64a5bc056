"""The work directory of the gradient baseline: what is finished is kept, and used again only with the same settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pairtrace.engine.atomic import replacing
from pairtrace.errors import ConfigError, DataFormatError

_SETTINGS = "settings.json"


class WorkDirectory:
    """Arrays and tensors under one directory, each complete or absent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> WorkDirectory:
        """Make the directory, or go on in one that was made with the same settings.

        Args:
            path: of the directory.
            settings: what decides its content, plain JSON values.

        Raises:
            ConfigError: it was made with other settings, or is somebody else's.
        """
        file = path / _SETTINGS
        if not file.exists():
            if path.is_dir() and any(path.iterdir()):
                raise ConfigError(f"{path} is not empty and has no {_SETTINGS}; choose another directory with --work")
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
            return cls(path)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataFormatError(f"{file} cannot be read: {error}; remove {path} to begin again") from error
        expected = json.loads(json.dumps(settings))
        for name in sorted(set(expected) | set(found)):
            if found.get(name) != expected.get(name):
                raise ConfigError(
                    f"{path} was made with {name} {found.get(name)!r}, but this run has {expected.get(name)!r}; "
                    "repeat its settings, choose another directory with --work, or remove it"
                )
        return cls(path)

    def has(self, name: str) -> bool:
        """Whether this file is finished."""
        return (self.path / name).exists()

    def save_array(self, name: str, values: np.ndarray) -> None:
        """Keep an array."""
        with replacing(self.path / name) as temporary, temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)

    def array(self, name: str) -> np.ndarray:
        """An array that was kept.

        Raises:
            DataFormatError: the file is damaged.
        """
        try:
            values = np.load(self.path / name, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(name, error) from error
        assert isinstance(values, np.ndarray)
        return values

    def save_tensors(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Keep named tensors with a description, plain JSON values."""
        with replacing(self.path / name) as temporary:
            save_file(tensors, temporary, metadata={"about": json.dumps(about)})

    def tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named tensors that were kept, and their description.

        Raises:
            DataFormatError: the file is damaged.
        """
        try:
            with safe_open(self.path / name, framework="pt") as file:
                about: dict[str, Any] = json.loads(file.metadata()["about"])
                return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, error: Exception) -> DataFormatError:
        return DataFormatError(f"{self.path / name} is damaged ({error}); remove it, and it is computed again")
