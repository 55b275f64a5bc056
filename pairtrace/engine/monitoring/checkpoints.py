"""The checkpoints of a run, as they lie there or as they appear."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairtrace.engine.checkpoint import (
    file_digest,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    require_whole_weights,
    resolve_checkpoint,
)
from pairtrace.engine.monitoring.config import MonitorRunConfig
from pairtrace.errors import ConfigError, MissingDependencyError, ModelError

if TYPE_CHECKING:
    from pairtrace.engine.monitoring.monitor import Numerics
    from pairtrace.engine.prompt_encoder import PromptEncoder
    from pairtrace.engine.sampling import Sampler

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(?:.*[-_])?(\d+)")
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def checkpoints_of(directory: Path) -> dict[int, Path]:
    """Checkpoint directories by step, ascending; adapters are checkpoints too.

    Raises:
        ConfigError: two of them are of the same step.
    """
    found: dict[int, Path] = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        name = _NAME.fullmatch(path.name)
        if name and any((path / file).is_file() for file in ("config.json", _ADAPTER)):
            step = int(name[1])
            if step in found:
                first, second = sorted((found[step], path))
                raise ConfigError(f"{first} and {second} are both of step {step}; move one of them elsewhere")
            found[step] = path
    return dict(sorted(found.items()))


def require_checkpoints(config: MonitorRunConfig) -> None:
    """Find out before any work that there is something to watch.

    Raises:
        ConfigError: there is no checkpoint, and none is waited for.
    """
    directory = Path(config.run)
    if not config.follow and not checkpoints_of(directory):
        if (directory / "pairtrace_train.json").is_file():
            raise ConfigError(
                f"{directory} is the result of a training that is over: its checkpoints lay in {directory}.partial "
                "and are gone; to look while it trains, give the prompts to `pairtrace train --monitor`"
            )
        advice = "give the directory above it" if (directory / "config.json").is_file() else "or --follow to wait"
        raise ConfigError(
            f"{directory} holds no checkpoints; expected are directories such as checkpoint-100 with a config.json "
            f"in them: {advice}"
        )


def arriving(config: MonitorRunConfig, after: int) -> Iterator[tuple[int, Path]]:
    """Checkpoints of a run, the earliest first, each once; with `follow` those that appear later as well.

    Args:
        config: what to wait for.
        after: the last step that is known already; once the end is reached, nothing is waited for.
    """
    directory = Path(config.run)
    if not config.follow:
        found = checkpoints_of(directory).items()
        yield from ((step, path) for step, path in found if _wanted(step, config) and _is_whole(path))
        return
    looks: dict[int, Any] = {}
    taken: set[int] = set()
    existed = directory.is_dir()
    waited_since = time.monotonic()
    while True:
        ready, changing = None, False
        for step, path in checkpoints_of(directory).items():
            if _wanted(step, config) and step not in taken:
                look = _look(path)
                if looks.get(step) == look and _is_whole(path, note=False):
                    ready = step, path
                    break
                changing = changing or looks.get(step) != look
                looks[step] = look
        if ready is not None:
            yield ready
            taken.add(ready[0])
            after = max(after, ready[0])
            waited_since = time.monotonic()
            continue
        if config.until_step is not None and after >= config.until_step and not changing:
            return
        if existed and not directory.is_dir():
            logger.info("%s is gone: the run has ended", directory)
            return
        existed = existed or directory.is_dir()
        if config.patience is not None and time.monotonic() - waited_since > config.patience:
            logger.info("no checkpoint came to %s for %g seconds", directory, config.patience)
            return
        time.sleep(config.poll_seconds)


def load_checkpoint(path: Path, config: MonitorRunConfig, encoder: PromptEncoder, numerics: Numerics) -> Sampler | None:
    """A checkpoint, ready to answer; None where it was removed meanwhile, as training does with old ones.

    Args:
        path: of a checkpoint, or of an adapter to M0.
        config: says where M0 is.
        encoder: of M0, whose tokens the checkpoint must share.
        numerics: as M0 answered.

    Raises:
        ModelError: it is damaged, or its tokens are others.
        MissingDependencyError: it is an adapter, and peft is not installed.
    """
    from pairtrace.engine.sampling import Sampler

    before = _look(path)
    try:
        _require_same_tokens(path, encoder)
        model = _load_adapter(path, config, numerics) if (path / _ADAPTER).is_file() else _load(path, numerics.dtype)
        return Sampler(model.to(numerics.device), encoder)
    except ModelError:
        if not _is_going(path, before):
            raise
        logger.warning("%s was removed before it was read; it is left out", path)
        return None


def checkpoint_fingerprint(path: Path) -> str | None:
    """SHA-256 (hex) over the weights and the configuration; None where it was removed meanwhile.

    Args:
        path: of a checkpoint, or of an adapter to M0.

    Raises:
        ModelError: it is damaged.
    """
    before = _look(path)
    try:
        if not (path / _ADAPTER).is_file():
            return model_fingerprint(path)
        digests = [file_digest(path / name) for name in (_ADAPTER, _ADAPTER_WEIGHTS)]
    except (ModelError, OSError) as error:
        if not _is_going(path, before):
            raise ModelError(f"the weights of {path} cannot be read: {error}") from error
        return None
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _load(path: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return load_model(AutoModelForCausalLM, path, load_config(path), dtype)


def _load_adapter(path: Path, config: MonitorRunConfig, numerics: Numerics) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingDependencyError("peft", "train", "reading an adapter") from error
    try:
        return PeftModel.from_pretrained(
            _load(resolve_checkpoint(config.base), numerics.dtype), path
        ).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the adapter {path} cannot be read: {error}") from error


def _require_same_tokens(path: Path, encoder: PromptEncoder) -> None:
    """A checkpoint that brings a tokenizer must give M0's tokens the same numbers."""
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    theirs, ours = load_tokenizer(path).get_vocab(), encoder.tokenizer.get_vocab()
    different = next((token for token, number in ours.items() if theirs.get(token) != number), None)
    if different is not None:
        raise ModelError(
            f"the tokenizer of {path} has number {theirs.get(different)} for {different!r}, but M0 ({encoder.model}) "
            f"{ours[different]}; give the checkpoint that this run started from with --base"
        )


def _wanted(step: int, config: MonitorRunConfig) -> bool:
    return config.until_step is None or step <= config.until_step


def _is_whole(path: Path, *, note: bool = True) -> bool:
    """Whether the weights are there to their last byte."""
    try:
        if (path / _ADAPTER).is_file() and not (path / _ADAPTER_WEIGHTS).is_file():
            raise ModelError(f"{path} holds no {_ADAPTER_WEIGHTS}")
        require_whole_weights(path)
    except ModelError as error:
        if note:
            logger.warning("%s; the checkpoint is left out", error)
        return False
    return True


def _is_going(path: Path, before: list[tuple[str, int, int]] | None) -> bool:
    """Whether a checkpoint that looked like that before is being removed: its files go one by one."""
    return _look(path) != before or not _is_whole(path, note=False)


def _look(path: Path) -> list[tuple[str, int, int]] | None:
    """Names, sizes and times of the files; None where they vanish meanwhile."""
    try:
        found = {file.name: file.stat() for file in path.iterdir()}
    except OSError:
        return None
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in found.items())
