"""Names for clusters, proposed by a language model that reads their exemplars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class NamingConfig:
    """The judge that proposes names.

    Attributes:
        base_url: of an OpenAI-compatible server, such as http://localhost:8000/v1.
        model: name of the judge there.
        api_key_env: environment variable that holds the key; None sends no key.
        concurrency: questions under way at the same time.
        timeout: seconds for one answer.
        attempts: how often a question is asked that fails for a passing reason.
        max_failures: questions in a row without an answer after which the server is given up.
        settings: entries of the request that are added, replaced or (None) taken out.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    concurrency: int = 4
    timeout: float = 120.0
    attempts: int = 5
    max_failures: int = 4
    settings: Mapping[str, Any] = field(default_factory=dict)
