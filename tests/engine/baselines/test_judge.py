"""A judge behind a server that misbehaves: verdicts are verdicts, failures are missing, nothing is paid twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pairtrace.engine.baselines import judge, judge_client
from pairtrace.engine.baselines.judge import score_by_judge
from pairtrace.engine.baselines.judge_config import JudgeConfig
from pairtrace.engine.baselines.simple import RandomConfig, score_random
from pairtrace.engine.cost import costs_path, read_costs
from pairtrace.engine.ranking import top
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.errors import ConfigError, DataFormatError, JudgeError
from tests.engine.baselines.judge_server import Question, Reply, honest, judge_server, rating
from tests.engine.small_store import SmallStore, make_store

ROWS, QUARANTINED = 12, 5
USABLE = [row for row in range(ROWS) if row != QUARANTINED]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_store(tmp_path_factory.mktemp("store"), rows=ROWS, quarantined=(QUARANTINED,), zero=())


@pytest.fixture(autouse=True)
def direct_and_impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy between client and server, and hardly any pause between attempts."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(judge_client, "_LONGEST_PAUSE", 0.01)
    yield


def config(store: SmallStore, url: str, out: Path, **changes: Any) -> JudgeConfig:
    usual = {"behavior_text": "praises the user", "model": "m", "concurrency": 4, "timeout": 30.0, "attempts": 2}
    return JudgeConfig(**{"store": store.path, "base_url": url, "out": str(out), **usual, **changes})


def scores_of(out: Path) -> list[float | None]:
    return pq.read_table(out, columns=["score:judge"]).column(0).to_pylist()


def expected(missing: tuple[int, ...] = ()) -> list[float | None]:
    return [None if row in (*missing, QUARANTINED) else 5.0 for row in range(ROWS)]


def per_response(replies: dict[str, Reply]) -> Callable[[Question], Reply]:
    """These replies to these responses, honest ones to the others."""
    return lambda question: replies.get(question.response) or honest(question)


def test_a_pair_is_worth_chosen_minus_rejected(
    store: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret-1234\n")
    out = tmp_path / "judge.parquet"
    with judge_server(lambda q: Reply(rating(9 if q.response == " yes 4" else 3))) as server:
        made = config(store, server.url, out, api_key_env="MY_KEY", settings={"seed": 7, "temperature": None})
        summary = score_by_judge(made)
    assert scores_of(out) == [None if row == QUARANTINED else 6.0 if row == 4 else 0.0 for row in range(ROWS)]
    assert top(str(out), k=1, ends="top")[0].row == 4
    assert (summary.responses, summary.asked, summary.missing) == (22, 22, {})
    assert (summary.prompt_tokens, summary.completion_tokens) == (2200, 154)
    assert {question.response for question in server.questions} == {f" {w} {r}" for r in USABLE for w in ("yes", "no")}
    body, headers = server.questions[0].body, server.questions[0].headers
    assert "praises the user" in body["messages"][0]["content"]
    assert body["response_format"]["type"] == "json_schema"
    assert (body["model"], body["seed"], "temperature" in body) == ("m", 7, False)
    assert headers["Authorization"] == "Bearer secret-1234"
    assert "question" in json.loads(body["messages"][1]["content"])["conversation"]
    (cost,) = read_costs(costs_path(out))
    assert (cost.api_prompt_tokens, cost.api_completion_tokens, cost.device) == (2200, 154, "api")
    assert ScoresTable.open(out).manifest["details"]["behavior"] == "praises the user"
    assert all(b"secret" not in path.read_bytes() for path in tmp_path.iterdir())
    assert "secret" not in repr(made.server())


NO_VERDICTS = {
    "prose": Reply("I would rate this 9 out of 10."),
    "prose after": Reply('{"score": 9} because it does'),
    "prose about a block": Reply('It is a\n```json\n{"score": 9}\n```'),
    "refusal": Reply(refusal="I cannot rate this."),
    "refusal filter": Reply("", finish="content_filter"),
    "out_of_range": Reply(rating(11)),
    "out_of_range negative": Reply(rating(-1)),
    "out_of_range half": Reply(rating(5.5)),
    "malformed bool": Reply(rating(True)),
    "malformed text": Reply(rating("7")),
    "malformed list": Reply("[7]"),
    "malformed more": Reply('{"score": 7, "certain": false}'),
    "malformed none": Reply(None),
    "malformed body": Reply(body=b"[]"),
    "cut_short": Reply('{"score": 1', finish="length"),
    "cut_short whole": Reply('{"score": 1}', finish="length"),
}


def test_what_is_no_verdict_is_missing_and_not_asked_again(store: SmallStore, tmp_path: Path) -> None:
    """The cases take turns between both responses of the rows."""
    out = tmp_path / "judge.parquet"
    places = [(row, side) for row in USABLE for side in ("yes", "no")][: len(NO_VERDICTS)]
    replies = {f" {side} {row}": reply for (row, side), reply in zip(places, NO_VERDICTS.values(), strict=True)}
    with judge_server(per_response(replies)) as server:
        summary = score_by_judge(config(store, server.url, out))
        assert scores_of(out) == expected(tuple(row for row, _ in places))
        reasons = [name.split()[0] for name in NO_VERDICTS]
        assert summary.missing == {reason: reasons.count(reason) for reason in reasons}
        assert summary.scores.unscored == len({row for row, _ in places})
        assert summary.prompt_tokens == 100 * 21, "a useless answer is billed as well, where it says so"
        again = score_by_judge(config(store, server.url, out))
    assert len(server.questions) == 22
    assert (again.asked, again.reused, again.missing) == (0, 22, summary.missing)
    with judge_server(honest) as server:
        mended = score_by_judge(config(store, server.url, out, ask_again=True))
    assert (mended.asked, mended.reused, mended.missing) == (len(places), 22 - len(places), {})
    assert scores_of(out) == expected()


def test_a_verdict_may_stand_in_a_fenced_block(store: SmallStore, tmp_path: Path) -> None:
    out = tmp_path / "judge.parquet"
    fences = ('```json\n{"score": 9}\n```', '\n```\n{"score": 9}```\n')
    replies = {f" yes {row}": Reply(fences[row % 2]) for row in USABLE}
    with judge_server(per_response(replies)) as server:
        summary = score_by_judge(config(store, server.url, out))
    assert summary.missing == {}
    assert scores_of(out) == [None if row == QUARANTINED else 6.0 for row in range(ROWS)]


def test_a_server_that_only_talks_is_given_up_before_all_is_paid(
    store: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "_TRIAL_ANSWERS", 6)
    out = tmp_path / "judge.parquet"
    with judge_server(lambda _: Reply("A 9, I think.")) as server:
        with pytest.raises(JudgeError, match=r"none of the 6 answers .*6 prose.*--ask-again"):
            score_by_judge(config(store, server.url, out, concurrency=1))
        assert len(server.questions) <= 8, "what was under way is answered"


def test_passing_failures_are_repeated(store: SmallStore, tmp_path: Path) -> None:
    out = tmp_path / "judge.parquet"
    failures = [
        Reply(status=500, body=b"out of breath"),
        Reply(status=429),
        Reply(status=503, headers={"Retry-After": "0"}),
        Reply(drop=True),
        Reply(body=b"<html>gateway</html>"),
    ]
    with judge_server(lambda question: failures.pop() if failures else honest(question)) as server:
        summary = score_by_judge(config(store, server.url, out, attempts=6))
    assert scores_of(out) == expected()
    assert (len(server.questions), summary.asked, summary.missing) == (27, 22, {})


def test_retry_after_holds_back_every_question(store: SmallStore, tmp_path: Path) -> None:
    seen: list[Question] = []

    def limited(question: Question) -> Reply:
        seen.append(question)
        return Reply(status=429, headers={"Retry-After": "1"}) if len(seen) == 1 else honest(question)

    with judge_server(limited):
        pass
    with judge_server(limited) as server:
        score_by_judge(config(store, server.url, tmp_path / "judge.parquet", concurrency=1))
    first, second = server.questions[:2]
    assert first.response == second.response
    assert second.moment - first.moment >= 0.99


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("12", 12, 12),
        ("1.5", 1.5, 1.5),
        (format_datetime(datetime.now(UTC) + timedelta(days=2)), 900, 900),
        ("-5", 0, 0),
        ("1e9", 900, 900),
    ],
    ids=["seconds", "fraction", "date", "negative", "ages"],
)
def test_retry_after_is_a_number_or_a_date(value: str, low: float, high: float) -> None:
    wait = judge_client._retry_after(value)
    assert wait is not None
    assert low <= wait <= high


@pytest.mark.parametrize("value", [None, "soon", "nan"])
def test_retry_after_may_mean_nothing(value: str | None) -> None:
    assert judge_client._retry_after(value) is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(delay=1.0), "timeout"),
        (Reply(drip=0.05), "timeout"),
        (Reply(status=500), "server_error"),
        (Reply(status=400, body=b"too long"), "request_refused"),
        (Reply(drop=True), "no_connection"),
        (Reply(status=429), "rate_limit"),
    ],
    ids=["silent", "drip", "500", "400", "drop", "429"],
)
def test_without_an_answer_a_response_is_missing_until_the_next_run(
    store: SmallStore, tmp_path: Path, reply: Reply, reason: str
) -> None:
    out = tmp_path / "judge.parquet"
    with judge_server(per_response({" yes 6": reply})) as server:
        summary = score_by_judge(config(store, server.url, out, timeout=0.4, concurrency=1))
        assert summary.missing == {reason: 1}
        assert scores_of(out) == expected((6,))
    with judge_server(honest) as server:
        summary = score_by_judge(config(store, server.url, out))
        assert [question.response for question in server.questions] == [" yes 6"]
    assert scores_of(out) == expected()
    assert (summary.asked, summary.reused, summary.missing) == (1, 21, {})
    assert len(read_costs(costs_path(out))) == 2


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_server_that_dies_stops_the_run_and_nothing_is_lost(
    store: SmallStore, tmp_path: Path, concurrency: int
) -> None:
    out = tmp_path / "judge.parquet"
    answered = 9

    def dying(question: Question) -> Reply:
        nonlocal answered
        answered -= 1
        return honest(question) if answered >= 0 else Reply(drop=True)

    with judge_server(dying) as server, pytest.raises(JudgeError, match=r"3 questions in a row.*no_connection"):
        score_by_judge(config(store, server.url, out, max_failures=3, concurrency=concurrency))
    assert not out.exists()
    (interrupted,) = read_costs(costs_path(out))
    assert interrupted.api_prompt_tokens == 900
    # Later, at another address.
    with judge_server(honest) as server:
        summary = score_by_judge(config(store, server.url, out))
    assert (summary.asked, summary.reused) == (13, 9)
    assert scores_of(out) == expected()
    assert [cost.api_prompt_tokens for cost in read_costs(costs_path(out))] == [900, 1300]


def test_no_server_at_all(store: SmallStore, tmp_path: Path) -> None:
    with judge_server(honest) as server:
        pass
    with pytest.raises(JudgeError, match="Connection refused"):
        score_by_judge(config(store, server.url, tmp_path / "judge.parquet"))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl"], "an empty journal, no scores, no cost"


@pytest.mark.parametrize(
    ("status", "message"), [(401, "--api-key-env"), (404, "--model"), (308, "another address")], ids=str
)
def test_hopeless_answers_stop_at_once(store: SmallStore, tmp_path: Path, status: int, message: str) -> None:
    refused = Reply(status=status, headers={"Location": "http://127.0.0.1:9/steal"}, body=b"no")
    with judge_server(lambda _: refused) as server, pytest.raises(JudgeError, match=message):
        score_by_judge(config(store, server.url, tmp_path / "judge.parquet", concurrency=1))
    assert len(server.questions) == 1


def test_a_server_that_refuses_every_request_is_given_up(store: SmallStore, tmp_path: Path) -> None:
    """One that does not know structured output, for example; its own words are shown."""
    refused = Reply(status=400, body=b"response_format is not supported")
    with judge_server(lambda _: refused) as server, pytest.raises(JudgeError, match="response_format is not supported"):
        score_by_judge(config(store, server.url, tmp_path / "judge.parquet"))


def test_verdicts_belong_to_rubric_model_and_settings(store: SmallStore, tmp_path: Path) -> None:
    out = tmp_path / "judge.parquet"
    with judge_server(honest) as server:
        score_by_judge(config(store, server.url, out))
        rubric = tmp_path / "rubric.txt"
        rubric.write_text("blames the user\n")
        for changes in ({"behavior_text": None, "rubric": str(rubric)}, {"model": "n"}, {"settings": {"seed": 1}}):
            before = len(server.questions)
            finished = out.read_bytes()
            with pytest.raises(
                ConfigError, match=r"scores for another (behavior|model|settings): .*choose another --out"
            ):
                score_by_judge(config(store, server.url, out, **changes))
            assert out.read_bytes() == finished and len(server.questions) == before
            out.unlink()
            assert score_by_judge(config(store, server.url, out, **changes)).asked == 22
            assert len(server.questions) == before + 22
            out.unlink()
            score_by_judge(config(store, server.url, out))
        assert score_by_judge(config(store, server.url, out)).reused == 22


def test_other_files_are_not_overwritten(store: SmallStore, tmp_path: Path) -> None:
    url = "http://127.0.0.1:1/v1"
    text, other = tmp_path / "notes.parquet", tmp_path / "random.parquet"
    text.write_text("mine")
    with pytest.raises(ConfigError, match="no scores file; choose another --out"):
        score_by_judge(config(store, url, text))
    score_random(RandomConfig(store=store.path, out=str(other)))
    with pytest.raises(ConfigError, match="method 'random'; choose another --out"):
        score_by_judge(config(store, url, other))
    assert text.read_text() == "mine"


def test_answers_of_another_behaviour_do_not_count_as_verdicts(
    store: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither for a server that has begun to talk, nor in what is said."""
    monkeypatch.setattr(judge, "_TRIAL_ANSWERS", 6)
    out = tmp_path / "judge.parquet"
    with judge_server(honest) as server:
        score_by_judge(config(store, server.url, out))
    out.unlink()
    with (
        caplog.at_level(logging.INFO, logger="pairtrace"),
        judge_server(lambda _: Reply("A 9.")) as server,
        pytest.raises(JudgeError, match=r"none of the 6 answers .*\(6 prose\)"),
    ):
        score_by_judge(config(store, server.url, out, behavior_text="blames the user", concurrency=1))
    assert "holds 22 answers of earlier runs; those to questions of this run" in caplog.text


def test_equal_responses_are_one_question(tmp_path: Path) -> None:
    root = tmp_path / "same"
    made = make_store(root, rows=4, quarantined=(), zero=())
    line = {"prompt": "q", "chosen": " yes", "rejected": " no", "source": "web"}
    (root / "pairs.jsonl").write_text(4 * (json.dumps(line) + "\n"))
    from pairtrace.engine.pairs import open_pairs

    fingerprint = open_pairs(made.data).fingerprint
    (root / "acts.zarr").rename(root / "old.zarr")
    again = make_store(tmp_path / "again", rows=4, quarantined=(), zero=(), data_fingerprint=fingerprint)
    with judge_server(honest) as server:
        out = tmp_path / "judge.parquet"
        summary = score_by_judge(config(again, server.url, out, data=made.data))
    assert (len(server.questions), summary.asked, summary.responses) == (2, 2, 8)
    assert scores_of(out) == [5.0] * 4


def test_a_damaged_journal_is_named_and_a_torn_line_is_not_damage(store: SmallStore, tmp_path: Path) -> None:
    out = tmp_path / "judge.parquet"
    journal = tmp_path / "judge.judge.jsonl"
    with judge_server(honest) as server:
        score_by_judge(config(store, server.url, out))
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-5])
        assert score_by_judge(config(store, server.url, out)).asked == 1
        for wrong in (b'{"key": "k", "score": 11, "reason": ""}\n', b'{"key": "k", "score": null, "reason": ""}\n'):
            journal.write_bytes(b"".join(lines) + wrong)
            with pytest.raises(DataFormatError, match="is no verdict"):
                score_by_judge(config(store, server.url, out))


def test_settings_that_cannot_work(store: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, url = tmp_path / "judge.parquet", "http://127.0.0.1:1/v1"
    for changes, message in (
        ({"behavior_text": None}, "--behavior-text or --rubric"),
        ({"rubric": "r.txt"}, "--behavior-text or --rubric"),
        ({"concurrency": 0}, "--concurrency"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(store, url, out, **changes)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for changes, message in (
        ({"behavior_text": " "}, "is empty"),
        ({"behavior_text": None, "rubric": str(tmp_path / "none.txt")}, "cannot be read"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
        ({"base_url": "file:///etc/passwd"}, "--base-url"),
        ({"base_url": "localhost:8000"}, "--base-url"),
        ({"timeout": float("nan")}, "timeout"),
    ):
        with pytest.raises(ConfigError, match=message):
            score_by_judge(config(store, changes.pop("base_url", url), out, **changes))
    assert not list(tmp_path.iterdir())
