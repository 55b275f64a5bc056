"""Settings of a judging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairtrace.engine.baselines.judge_client import ServerConfig, read_api_key
from pairtrace.engine.baselines.judge_request import Rubric
from pairtrace.engine.baselines.scores_file import require_parquet
from pairtrace.engine.vllm.options import VLLMOptions, check_backend
from pairtrace.errors import ConfigError

SERVER = "server"
JUDGES = (SERVER, "vllm")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """A judge and how it is asked, whatever the question.

    Attributes:
        base_url: of an OpenAI-compatible server, such as http://localhost:8000/v1.
        model: name of the judge there.
        api_key_env: environment variable that holds the key; None sends no key.
        concurrency: questions under way at the same time.
        timeout: seconds for one answer.
        attempts: how often a question is asked that fails for a passing reason.
        max_failures: questions in a row without an answer after which the server is given up; see `ServerConfig`.
        settings: entries of the request that are added, replaced or (None) taken out.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    attempts: int = 5
    max_failures: int = 8
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(f"--concurrency is {self.concurrency}; expected at least 1")

    def server(self) -> ServerConfig:
        """Where and how to ask.

        Raises:
            ConfigError: the environment variable is not set, or a setting is out of range.
        """
        return ServerConfig(
            base_url=self.base_url,
            api_key=read_api_key(self.api_key_env),
            timeout=self.timeout,
            attempts=self.attempts,
            max_failures=self.max_failures,
        )


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(JudgeSettings):
    """What `score_by_judge` does.

    Attributes:
        store: path of the activation store.
        out: parquet file to write; verdicts are kept beside it (`scores.judge.jsonl`).
        behavior_text: the behaviour in words; or `rubric`.
        rubric: file with a longer description.
        data: where the preference data is; None for the path that the store recorded.
        ask_again: ask again where an earlier run was answered without a verdict, after the server was changed.
        name: of the score column.
        backend: "server", or "vllm": the checkpoint `model` is run here, without a server.
        vllm: how vLLM is run; None for its defaults.
    """

    base_url: str = ""
    store: str
    out: str
    behavior_text: str | None = None
    rubric: str | None = None
    data: str | None = None
    ask_again: bool = False
    name: str = "judge"
    backend: str = SERVER
    vllm: VLLMOptions | None = None

    def __post_init__(self) -> None:
        require_parquet(self.out)
        check_backend(self.backend, self.vllm, JUDGES)
        if self.backend == SERVER and not self.base_url:
            raise ConfigError("a judge behind a server needs its address: --base-url; or --backend vllm runs one here")
        if self.backend != SERVER and (self.base_url or self.api_key_env is not None):
            raise ConfigError(
                f"--base-url and --api-key-env are for a judge behind a server, but --backend is {self.backend}"
            )
        if (self.behavior_text is None) == (self.rubric is None):
            raise ConfigError("expected either --behavior-text or --rubric: the judge has to be told the behaviour")
        super().__post_init__()

    def load_rubric(self) -> Rubric:
        """What the judge is asked.

        Raises:
            ConfigError: the rubric cannot be read, or is empty.
        """
        text = self.behavior_text
        if self.rubric is not None:
            try:
                text = Path(self.rubric).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"the rubric {self.rubric} cannot be read: {error}") from error
        if text is None or not text.strip():
            raise ConfigError("the description of the behaviour is empty")
        return Rubric(behavior=text.strip(), model=self.model, settings=dict(self.settings))
