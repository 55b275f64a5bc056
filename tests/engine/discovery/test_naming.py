"""Names from a judge: proposed or missing, never invented, never asked for twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pairtrace.engine.baselines import judge_client
from pairtrace.engine.discovery.naming import Names, NamingConfig, propose_names
from pairtrace.errors import ConfigError, DataFormatError
from tests.engine.baselines.judge_server import Question, Reply, judge_server

EXAMPLES = [
    [{"prompt": f"ask {cluster}-{number}", "chosen": "x" * 2000} for number in range(3)] for cluster in range(4)
]


@pytest.fixture(autouse=True)
def direct_and_impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy between client and server, and hardly any pause between attempts."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(judge_client, "_LONGEST_PAUSE", 0.01)
    yield


def named(name: object) -> Reply:
    return Reply(json.dumps({"name": name}))


def cluster_of(question: Question) -> int:
    """Which cluster is asked about."""
    examples = json.loads(question.body["messages"][1]["content"])["examples"]
    return int(examples[0]["prompt"].removeprefix("ask ").split("-")[0])


def ask(url: str, path: Path, examples: list[list[dict[str, str]]] = EXAMPLES, **changes: Any) -> Names:
    config = NamingConfig(**{"base_url": url, "model": "m", "attempts": 2, "timeout": 30.0, **changes})
    return propose_names("pairs", examples, config, path)


def test_every_cluster_gets_its_own_name_and_is_asked_about_once(tmp_path: Path) -> None:
    with judge_server(lambda question: named(f" praises\n user {cluster_of(question)} ")) as server:
        first = ask(server.url, tmp_path / "names.jsonl")
        again = ask(server.url, tmp_path / "names.jsonl")
        more = ask(server.url, tmp_path / "names.jsonl", [*EXAMPLES, [{"prompt": "ask 9-0"}]])
    assert first.names == tuple(f"praises user {number}" for number in range(4))
    assert (first.asked, first.reused, first.missing) == (4, 0, {})
    assert (first.prompt_tokens, first.completion_tokens) == (400, 28)
    assert (again.names, again.asked, again.reused, again.prompt_tokens) == (first.names, 0, 4, 0)
    assert (more.names[4], more.asked, more.reused) == ("praises user 9", 1, 4)
    body = server.questions[0].body
    assert "at most 8 words" in body["messages"][0]["content"]
    assert body["response_format"]["type"] == "json_schema"
    shown = json.loads(body["messages"][1]["content"])["examples"]
    assert len(shown) == 3
    assert len(shown[0]["chosen"]) == 800


NO_NAMES = {
    "prose": Reply("It praises the user."),
    "refusal": Reply(refusal="I cannot."),
    "too_long": named("one two three four five six seven eight nine"),
    "too_long letters": named("x" * 101),
    "cut_short": Reply('{"name": "prai', finish="length"),
    "malformed": named(["praise"]),
    "malformed empty": named("  "),
    "malformed control": named("praise \x1b[2J user"),
    "malformed more": Reply('{"name": "praise", "why": "so"}'),
    "request_refused": Reply(status=400),
    "server_error": Reply(status=500),
}


@pytest.mark.parametrize("kind", sorted(NO_NAMES))
def test_what_is_no_name_is_missing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "names.jsonl"
    reply = NO_NAMES[kind]
    with judge_server(lambda question: reply if cluster_of(question) == 2 else named("fine")) as server:
        found = ask(server.url, path, concurrency=1)
    assert found.names == ("fine", "fine", None, "fine")
    assert found.missing == {kind.split(maxsplit=1)[0]: 1}
    with judge_server(lambda _: named("mended")) as server:
        again = ask(server.url, path)
    # What got no answer at all is asked again, an answer without a name is not.
    unanswered = kind in ("request_refused", "server_error")
    assert len(server.questions) == (1 if unanswered else 0)
    assert again.names[2] == ("mended" if unanswered else None)


@pytest.mark.parametrize("status", [None, 404])
def test_a_server_that_is_not_there_costs_the_names_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int | None
) -> None:
    path = tmp_path / "names.jsonl"
    with judge_server(lambda _: Reply(status=404)) as server:
        url = server.url if status else "http://127.0.0.1:1/v1"
        with caplog.at_level(logging.WARNING):
            found = ask(url, path, max_failures=2)
    assert found.names == (None,) * 4
    assert sum(found.missing.values()) == 4
    assert "clusters stay without a name" in caplog.text
    with judge_server(lambda _: named("late")) as server:
        assert ask(server.url, path).names == ("late",) * 4


def test_a_cluster_without_texts_is_not_asked_about(tmp_path: Path) -> None:
    with judge_server(lambda _: named("fine")) as server:
        found = ask(server.url, tmp_path / "names.jsonl", [[{}, {}], EXAMPLES[0], []])
    assert found.names == (None, "fine", None)
    assert found.missing == {"no_texts": 2}
    assert len(server.questions) == 1


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "names.jsonl"
    with judge_server(lambda _: named("fine")) as server:
        ask(server.url, path)
        with path.open("a") as journal:
            journal.write(json.dumps({"key": "k", "name": 3, "reason": ""}) + "\n")
        with pytest.raises(DataFormatError, match=r"names.jsonl is damaged: .* is no answer"):
            ask(server.url, path)


def test_settings_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for changes, message in (
        ({"concurrency": 0}, "--concurrency is 0"),
        ({"base_url": "localhost"}, "--base-url is 'localhost'"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY of --api-key-env holds no key"),
    ):
        with pytest.raises(ConfigError, match=message):
            NamingConfig(**{"base_url": "http://localhost/v1", "model": "m", **changes})
