"""Checkpoints on disk: where they are, what identifies them, which device and dtype they run in."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairtrace.errors import ConfigError, ModelError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
_DESCRIPTION_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
_HASH_BLOCK = 1 << 22
# Written by the library that saved the file; they do not change what the model computes.
_VOLATILE_CONFIG_KEYS = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache")


def resolve_checkpoint(model: str | Path, *, weights: bool = True) -> Path:
    """Return the local directory of a checkpoint: the given directory, or the hub's local copy of an id.

    Args:
        model: directory or hub id.
        weights: fetch the weights as well; otherwise configuration and tokenizer only.

    Raises:
        ModelError: the directory has no `config.json`, or the id can neither be found nor fetched.
    """
    path = _local_directory(model, weights=weights)
    if (path / "config.json").is_file():
        return path
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} is an adapter without its model; merge it first (peft: merge_and_unload, then save)")
    raise ModelError(f"{path} is not a checkpoint: it has no config.json")


def _local_directory(model: str | Path, *, weights: bool = True) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; expected a checkpoint directory with config.json and *.safetensors")
    if str(model).startswith((".", "/", "~")):
        raise ModelError(f"there is no directory {path}; expected a checkpoint directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [*_DESCRIPTION_PATTERNS, *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{str(model)!r} is neither a local directory nor a model that the hub returned "
            f"({str(error).strip().splitlines()[0]})"
        ) from error


def load_config(model: str | Path) -> Any:
    """Read the transformers configuration of a checkpoint; code shipped with the checkpoint is never run.

    Raises:
        ModelError: the configuration is missing, damaged or of an unknown model type.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = resolve_checkpoint(model)
    _read_json(path / "config.json")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"the configuration of {path} cannot be read: {error}") from error


def described_blocks(model: str | Path) -> int | None:
    """Number of blocks by the `config.json` of a local checkpoint, without transformers; None where it does not tell.

    Raises:
        ModelError: a local directory is no checkpoint, or its configuration is damaged.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        return None
    blocks = _read_json(resolve_checkpoint(path) / "config.json").get("num_hidden_layers")
    return blocks if type(blocks) is int else None


def load_tokenizer(model: str | Path) -> Any:
    """Load the tokenizer of a checkpoint; code shipped with the checkpoint is never run.

    Raises:
        ModelError: the checkpoint has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    path = _local_directory(model)
    if not any((path / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"{path} is not a checkpoint: it has neither a config.json nor tokenizer files")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"no tokenizer could be loaded from {path}: {error}; a checkpoint directory needs its tokenizer files"
        ) from error


def load_model(factory: Any, path: Path, config: Any, dtype: str, *, expendable: frozenset[str] = frozenset()) -> Any:
    """Load the weights of a checkpoint into the model that `config` describes, on the CPU.

    Args:
        factory: a transformers auto class, such as `AutoModelForCausalLM`.
        path: checkpoint directory.
        config: the configuration, possibly cut to fewer blocks; weights that it has no place for are left out.
        dtype: "auto" or a name in `COMPUTE_DTYPES`.
        expendable: parameters that may be absent because they will not be used.

    Raises:
        ModelError: weights are missing, damaged or of another shape.
        ConfigError: the dtype is unknown.
    """
    from safetensors import SafetensorError

    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{path} is quantised; give the checkpoint in float32, bfloat16 or float16")
    weight_files(path)
    try:
        with quiet_transformers():
            model, report = factory.from_pretrained(
                path,
                config=config,
                dtype=resolve_dtype(dtype, config),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"the weights of {path} cannot be loaded: {error}") from error
    # Transformers fills what is absent with random numbers and only warns.
    absent = sorted(set(report["missing_keys"]) - expendable)
    if absent:
        raise ModelError(f"{path} lacks {len(absent)} weights of the model, for example {absent[0]}")
    return model


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, sorted by name.

    Raises:
        ModelError: there are none (pickled weights are never read).
    """
    files = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} is damaged: it has no weight_map")
        names = {str(name) for name in weight_map.values()}
        missing = sorted(name for name in names if not (path / name).is_file())
        if missing:
            raise ModelError(
                f"{path} is incomplete: {len(missing)} of {len(names)} weight files are missing, "
                f"for example {missing[0]}"
            )
        files = sorted(path / name for name in names)
    if not files:
        pickled = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))
        found = f"only {pickled[0].name}, which would have to be unpickled" if pickled else "no weights"
        raise ModelError(f"{path} holds {found}; expected *.safetensors (convert with save_pretrained)")
    return files


def require_whole_weights(path: Path) -> None:
    """Find a half-written file before any work: its header says how long it must be.

    Raises:
        ModelError: weights are missing, damaged or half written.
    """
    from safetensors import SafetensorError, safe_open

    for file in weight_files(path):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} is damaged or half written ({error}); wait until it is complete, or write it again"
            ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged: expected a JSON object, not {type(content).__name__}")
    return content


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of the bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def model_fingerprint(model: str | Path) -> str:
    """SHA-256 (hex) over the checkpoint's weight files and its configuration.

    Every byte of the weights counts: two checkpoints of one training run never share a fingerprint. Costs one
    sequential read of the weights.

    Raises:
        ModelError: not a checkpoint, or no safetensors in it.
    """
    path = resolve_checkpoint(model)
    files = weight_files(path)
    config = _read_json(path / "config.json")
    for key in _VOLATILE_CONFIG_KEYS:
        config.pop(key, None)
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(file_digest, files))
    overall = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file, found in zip(files, digests, strict=True):
        overall.update(f"{file.name}={found}\n".encode())
    return overall.hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading bars and its list of weights that are left out on purpose."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def resolve_device(device: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:1" into a device.

    Raises:
        ConfigError: the device is unknown or not available here.
    """
    import torch

    if device == "auto":
        resolved = "cuda" if torch.cuda.is_available() else "cpu"
        logger.debug("device auto: %s", resolved)
        return torch.device(resolved)
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {device!r}; expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ConfigError(
            f"device {device!r} was asked for, but this PyTorch ({torch.__version__}) sees {count} CUDA devices; "
            "use --device cpu, or install a CUDA build of torch"
        )
    return chosen


def resolve_dtype(dtype: str, config: Any) -> torch.dtype:
    """Turn "auto" or a name into the dtype of the forward pass; "auto" is the checkpoint's own.

    Raises:
        ConfigError: the name is not one of `COMPUTE_DTYPES`.
    """
    import torch

    if dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"unknown compute dtype {dtype!r}; expected one of {', '.join(COMPUTE_DTYPES)}")
    if dtype == "auto":
        stored = getattr(config, "dtype", None)
        return stored if isinstance(stored, torch.dtype) else torch.float32
    named = getattr(torch, dtype)
    assert isinstance(named, torch.dtype)
    return named
