"""A judge that leaves some questions without an answer: those are missing, and the server is not dead."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pairtrace.engine.baselines import judge_client
from pairtrace.engine.baselines.judge import score_by_judge
from pairtrace.engine.baselines.judge_client import JudgeClient, ServerConfig
from pairtrace.engine.baselines.judge_config import JudgeConfig
from pairtrace.errors import JudgeError
from tests.engine.baselines.judge_server import Reply, honest, judge_server, rating
from tests.engine.small_store import make_store


def test_questions_that_hang_together_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run out of time one right after another, when all other questions have long been answered."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = make_store(tmp_path, rows=60, quarantined=(), zero=())
    hanging = {f" {side} {row}" for row in range(3, 60, 10) for side in ("yes", "no")}
    out = tmp_path / "judge.parquet"
    with judge_server(lambda q: Reply(delay=6.0) if q.response in hanging else honest(q)) as server:
        limits: dict[str, Any] = {"timeout": 2.5, "attempts": 1, "concurrency": 32}
        summary = score_by_judge(
            JudgeConfig(
                store=made.path,
                out=str(out),
                base_url=server.url,
                model="m",
                behavior_text="praises the user",
                **limits,
            )
        )
    assert summary.missing == {"timeout": 12}
    assert pq.read_table(out, columns=["score:judge"]).column(0).to_pylist() == [
        None if row % 10 == 3 else 5.0 for row in range(60)
    ]


def test_a_failure_counts_where_nothing_was_answered_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions hang while a third is answered; two more get no answer, and nobody else does either."""
    client = JudgeClient(ServerConfig(base_url="http://127.0.0.1:1/v1", attempts=1, max_failures=2))
    begun, go_on = threading.Barrier(3), threading.Event()

    def post(body: dict[str, Any]) -> Any:
        if body["kind"] == "answered":
            return {"choices": [{"message": {"content": rating(5)}, "finish_reason": "stop"}]}
        if body["kind"] == "hangs":
            begun.wait(30)
            assert go_on.wait(30)
        raise judge_client._AttemptError(judge_client.TIMEOUT, "no answer")

    monkeypatch.setattr(client, "_post", post)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.ask, {"kind": "hangs"}) for _ in range(2)]
        begun.wait(30)
        assert client.ask({"kind": "answered"}).score == 5
        go_on.set()
        assert [one.result().reason for one in waiting] == ["timeout", "timeout"]
    assert client.ask({"kind": "fails"}).reason == "timeout"
    with pytest.raises(JudgeError, match=r"2 questions in a row.*--max-failures"):
        client.ask({"kind": "fails"})
