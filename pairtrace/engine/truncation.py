"""Truncated checkpoints: the first blocks of a model as a checkpoint of its own, for engines that load whole ones.

Tensors are moved as bytes: nothing is decoded, so any dtype passes, and nothing is unpickled. A weight file of which
everything stays is linked, not copied; only the file that the cut goes through is written again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pairtrace.engine.architectures import PER_LAYER_LISTS, known_family
from pairtrace.engine.checkpoint import load_config, resolve_checkpoint, weight_files
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.safetensors_files import kept_tensors, read_header, write_subset
from pairtrace.errors import ConfigError, LayerError, ModelError

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
RECORD = "pairtrace_truncated.json"
# What a tokenizer and a generation need; weights are dealt with by themselves, code is never carried.
_CARRIED = ("*.json", "*.model", "*.txt", "*.jinja")
# Reasons why a file system makes no hard link: another device, or links not known, not allowed or used up.
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})


@dataclass(frozen=True, kw_only=True)
class TruncateConfig:
    """What `truncate` does.

    Attributes:
        model: checkpoint directory or hub id.
        layers: blocks to keep, from 1 to those that the model has; layer `layers` is then the last one.
        out: directory of the truncated checkpoint; it appears when complete.
    """

    model: str
    layers: int
    out: str


@dataclass(frozen=True, kw_only=True)
class TruncateSummary:
    """What a truncation did.

    Attributes:
        out: the directory.
        layers: blocks kept.
        of: blocks that the model has.
        linked: weight files that were linked.
        copied: weight files that had to be copied whole, because the file system makes no link.
        rewritten: weight files that were written again with a part of their tensors.
        dropped: weight files of which nothing stays.
        bytes_written: bytes of weights written; linked ones cost nothing.
        bytes: bytes of all weights in `out`.
    """

    out: str
    layers: int
    of: int
    linked: int
    copied: int
    rewritten: int
    dropped: int
    bytes_written: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def truncate(config: TruncateConfig, progress: Progress = NULL_PROGRESS) -> TruncateSummary:
    """Write the first blocks of a checkpoint, with embedding, final norm and head, as a checkpoint of its own.

    Raises:
        LayerError: `layers` is below 1 or beyond the number of blocks.
        UnsupportedModelError: the architecture is not known.
        ModelError: the checkpoint is incomplete or damaged.
        ConfigError: `out` exists, or cannot be written.
    """
    path, out = resolve_checkpoint(config.model), Path(config.out)
    model_config = load_config(path)
    family, blocks = known_family(model_config), int(model_config.num_hidden_layers)
    if not 1 <= config.layers <= blocks:
        raise LayerError(
            f"--layers is {config.layers}, but {config.model} can be truncated to 1 to {blocks} of its {blocks} blocks"
        )
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out, or remove it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        # A killed run may have left it: process ids come back, in a container at each start.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        summary = _write(path, partial, family.blocks, config.layers, blocks, progress)
        record = {**summary, "files": _weights_now(partial)}
        (partial / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        partial.rename(out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error}; check the free space and permissions") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TruncateSummary(out=str(out), **summary)


def _write(path: Path, out: Path, name: str, layers: int, blocks: int, progress: Progress) -> dict[str, int]:
    _carry_description(path, out, layers, blocks)
    deeper = re.compile(rf"(?:^|\.){re.escape(name)}\.(\d+)\.")

    def stays(tensor: str) -> bool:
        found = deeper.search(tensor)
        return found is None or int(found[1]) < layers

    counts = dict.fromkeys(("linked", "copied", "rewritten", "dropped", "bytes_written"), 0)
    place_of: dict[str, str] = {}
    total = 0
    files = weight_files(path)
    progress.start("truncate", len(files), "files")
    for file in files:
        header = read_header(file)
        kept = kept_tensors(header, stays)
        target = out / file.name
        if not kept:
            counts["dropped"] += 1
        elif len(kept) == len(kept_tensors(header, lambda _: True)):
            linked = _link(file, target)
            counts["linked" if linked else "copied"] += 1
            counts["bytes_written"] += 0 if linked else target.stat().st_size
        else:
            write_subset(file, header, kept, target)
            counts["rewritten"] += 1
            counts["bytes_written"] += target.stat().st_size
        for tensor in kept:
            begin, end = header.tensors[tensor]["data_offsets"]
            total += end - begin
            place_of[tensor] = file.name
        progress.advance(1)
    progress.finish()
    _require_all(path, out, set(place_of))
    if (path / INDEX).is_file():
        wanted = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        missing = [tensor for tensor in filter(stays, sorted(wanted)) if tensor not in place_of]
        if missing:
            raise ModelError(
                f"{path} is incomplete: its weight files lack {missing[0]} ({len(missing)} of the tensors that are to "
                f"stay and that {INDEX} names)"
            )
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place_of.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return {"layers": layers, "of": blocks, **counts, "bytes": total}


def _require_all(path: Path, out: Path, kept: set[str]) -> None:
    """Find weights that no file holds: engines tell of them late, or fill them with random numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(out))
    wanted = set(model.state_dict())
    if kept - wanted:
        return  # the names in the files are others, which loading translates
    absent = sorted(wanted - kept - set(model.all_tied_weights_keys))
    if absent:
        raise ModelError(
            f"{path} is incomplete: it lacks {len(absent)} weights of what is to stay, for example {absent[0]}"
        )


def _carry_description(path: Path, out: Path, layers: int, blocks: int) -> None:
    """Configuration, cut to fewer blocks, and everything that the tokenizer needs, as it is."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    for key in PER_LAYER_LISTS:
        values = config.get(key)
        if isinstance(values, list) and len(values) == blocks:
            config[key] = values[:layers]
    if isinstance(config.get("max_window_layers"), int):
        config["max_window_layers"] = min(config["max_window_layers"], layers)
    for pattern in _CARRIED:
        for file in sorted(path.glob(pattern)):
            if file.name not in ("config.json", INDEX, RECORD):
                shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _link(file: Path, target: Path) -> bool:
    """Make `target` the same file as `file`; False where it had to be copied."""
    source = file.resolve()  # the hub's cache holds symbolic links, and a link to one of those may lead nowhere
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        logger.info("%s cannot be linked to (%s): it is copied", source, error.strerror)
        shutil.copyfile(source, target)
        return False
    return True


def cached_truncation(model: str, layers: int, fingerprint: str, progress: Progress = NULL_PROGRESS) -> Path:
    """The checkpoint `model` with its first `layers` blocks (at least one), made when it is first asked for.

    It lies in the user's cache directory (`PAIRTRACE_CACHE`, else `XDG_CACHE_HOME/pairtrace`, else
    `~/.cache/pairtrace`), under the fingerprint of the weights. A checkpoint that has no more blocks is returned as it
    is.

    Raises:
        ModelError, ConfigError: as for `truncate`.
    """
    path, layers = resolve_checkpoint(model), max(1, layers)
    if layers >= int(load_config(path).num_hidden_layers):
        return path
    out = cache_directory() / "truncated" / f"{fingerprint[:24]}-{layers}"
    if _is_whole(out):
        return out
    # A linked file is the checkpoint's own: writing to that in place has changed this one too.
    shutil.rmtree(out, ignore_errors=True)
    try:
        made = truncate(TruncateConfig(model=str(path), layers=layers, out=str(out)), progress)
    except ConfigError as error:
        if not _is_whole(out):  # else another process was faster
            raise ConfigError(f"{error}; PAIRTRACE_CACHE names another directory for it") from error
    else:
        logger.info("the first %d of %d blocks of %s are kept in %s", layers, made.of, model, out)
    return out


def _weights_now(directory: Path) -> dict[str, list[int]]:
    """Size and time of the last change (ns) of each weight file."""
    status = {file.name: file.stat() for file in sorted(directory.glob("*.safetensors"))}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in status.items()}


def _is_whole(directory: Path) -> bool:
    """Whether a directory holds a truncated checkpoint whose weights nobody has touched since it was made."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("files") == _weights_now(directory)


def cache_directory() -> Path:
    """Where pairtrace keeps what it can make again."""
    if given := os.environ.get("PAIRTRACE_CACHE"):
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "pairtrace"
