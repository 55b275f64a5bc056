"""A language model as the judge: how much more of the behaviour the chosen response shows than the rejected one.

Each response is rated by itself, from 0 to 10; a pair's score is the rating of chosen minus that of rejected. Ratings
are kept in a journal beside the scores, by content, rubric and model, so that nothing is asked (and paid) twice.
Legend: N pairs.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pairtrace.engine.baselines.judge_client import UNANSWERED, JudgeClient
from pairtrace.engine.baselines.judge_config import SERVER, JudgeConfig
from pairtrace.engine.baselines.judge_request import CUT_SHORT, HIGHEST, LOWEST, Rubric, Verdict
from pairtrace.engine.baselines.scores_file import BaselineScores, write_baseline
from pairtrace.engine.baselines.store_pairs import open_store_data
from pairtrace.engine.cost import API, CostMeter, costs_path
from pairtrace.engine.journal import Journal
from pairtrace.engine.pairs import PairSource
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.errors import ConfigError, DataFormatError, JudgeError
from pairtrace.store.layout import OK
from pairtrace.store.reader import ActivationStore

if TYPE_CHECKING:
    from pairtrace.engine.vllm.judge import VLLMJudge

logger = logging.getLogger(__name__)

# Seconds of verdicts that a power cut may cost.
_SYNC_SECONDS = 2.0
# Answers without a single verdict after which the server is taken to ignore the schema, before all of them are paid.
_TRIAL_ANSWERS = 32


@dataclass(frozen=True, kw_only=True)
class JudgeSummary:
    """What a judging did.

    Attributes:
        scores: the scores file.
        responses: of the pairs that the store did not quarantine, two each.
        asked: questions of this run; equal responses to equal prompts are one question.
        reused: different questions whose answer an earlier run had kept.
        missing: responses without a verdict, by reason.
        prompt_tokens, completion_tokens: of this run, as the server counted them.
        seconds: wall time.
    """

    scores: BaselineScores
    responses: int
    asked: int
    reused: int
    missing: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values, that of the scores file first."""
        own = {name: value for name, value in vars(self).items() if name != "scores"}
        return {**self.scores.to_dict(), **own}


def score_by_judge(config: JudgeConfig, progress: Progress = NULL_PROGRESS) -> JudgeSummary:
    """Have every response of a store rated and write the scores file.

    A response without a verdict leaves its pair without a score. What got no answer at all is asked again by the next
    run of the same command; verdicts, and (but for `ask_again`) answers without one, are not.

    Raises:
        JudgeError: the server cannot be reached any more, refuses every question, or gives answers but no verdict; what
            it answered is kept.
        EngineError: vLLM does not start, or died; what it answered is kept.
        MissingDependencyError: the back end vllm without vLLM.
        StoreError: the store cannot be read or is incomplete.
        DataError: the data is not there or is not that of the store, or the journal is damaged.
        ConfigError: an option cannot be used, `out` holds the scores of another behaviour, judge or method, or a file
            cannot be written.
    """
    begun = time.perf_counter()
    _refuse_other_scores(config)
    rubric = config.load_rubric()
    store = ActivationStore.open(config.store)
    source = open_store_data(store, config.data)
    usable = store.status() == OK
    path = Path(config.out).with_name(Path(config.out).stem + ".judge.jsonl")
    # Verdicts carry their question in their key: one journal serves any rubric, model and data.
    with (
        _opened(config) as client,
        Journal(path, {"kind": "judge verdicts"}, sync_seconds=_SYNC_SECONDS) as journal,
        CostMeter(
            method="judge",
            stage="score",
            device=API if config.backend == SERVER else "auto",
            path=costs_path(config.out),
            resumed=bool(journal.entries),
        ) as meter,
    ):
        judging = _Judging(client, rubric, journal, meter, progress)
        if config.ask_again:
            judging.forget_missing()
        if judging.verdicts:
            logger.info(
                "%s holds %d answers of earlier runs; those to questions of this run are not asked for again",
                path,
                len(judging.verdicts),
            )
        progress.start("judge", 2 * int(usable.sum()), "responses")
        keys = judging.run(source, usable, config.concurrency)
        progress.finish()
    scores, missing = _scores(keys, usable, judging.verdicts)
    details = {
        "base_url": config.base_url or None,
        "model": config.model,
        "behavior": rubric.behavior,
        "settings": dict(config.settings),
        "scale": [LOWEST, HIGHEST],
        "score": "rating of chosen minus rating of rejected",
        "missing": missing,
    }
    written = write_baseline(store, config.out, {config.name: scores}, method="judge", details=details)
    return JudgeSummary(
        scores=written,
        responses=2 * int(usable.sum()),
        asked=judging.asked,
        reused=judging.reused,
        missing=missing,
        prompt_tokens=judging.prompt_tokens,
        completion_tokens=judging.completion_tokens,
        seconds=time.perf_counter() - begun,
    )


@contextmanager
def _opened(config: JudgeConfig) -> Iterator[JudgeClient | VLLMJudge]:
    """The judge, ready to be asked."""
    if config.backend == SERVER:
        yield JudgeClient(config.server())
        return
    from pairtrace.engine.vllm.judge import VLLMJudge

    judge = VLLMJudge(config.model, config.vllm)
    try:
        yield judge
    finally:
        judge.close()


class _Judging:
    """One run over the data: asks what is not known yet, and keeps what is answered."""

    def __init__(
        self, client: JudgeClient | VLLMJudge, rubric: Rubric, journal: Journal, meter: CostMeter, progress: Progress
    ) -> None:
        self.verdicts = dict(_replay(journal))
        self.asked = 0
        self.reused = 0
        self.prompt_tokens = self.completion_tokens = 0
        self._scored = 0
        self._without: Counter[str] = Counter()
        self._known = frozenset(self.verdicts)
        self._client, self._rubric, self._journal, self._meter = client, rubric, journal, meter
        self._progress = progress
        self._pending: dict[Future[Verdict], str] = {}

    def forget_missing(self) -> None:
        """Ask again where an earlier run was answered without a verdict."""
        self.verdicts = {key: verdict for key, verdict in self.verdicts.items() if verdict.score is not None}
        self._known = frozenset(self.verdicts)

    def run(self, source: PairSource, usable: np.ndarray, concurrency: int) -> np.ndarray:
        """Ask about both responses of every usable pair; returns their keys, bytes [N, 2]."""
        keys = np.zeros((len(usable), 2), dtype="S32")
        seen: set[str] = set()
        with ThreadPoolExecutor(concurrency, thread_name_prefix="pairtrace-judge") as pool:
            try:
                for row, pair in enumerate(source.read()):
                    if not usable[row]:
                        continue
                    assert pair.prompt is not None
                    for side, response in enumerate((pair.chosen, pair.rejected)):
                        key = self._rubric.key(pair.prompt, response)
                        keys[row, side] = key
                        new = key not in seen
                        seen.add(key)
                        if not new or key in self._known:
                            self.reused += new
                            self._scored += new and self.verdicts[key].score is not None
                            self._progress.advance(1)
                            continue
                        self._pending[pool.submit(self._client.ask, self._rubric.body(pair.prompt, response))] = key
                        if len(self._pending) >= 2 * concurrency:
                            self._collect()
                while self._pending:
                    self._collect()
            finally:
                # After an error or an interruption: no new questions, but what is being answered is kept.
                self._client.stop()
                for future in self._pending:
                    future.cancel()
                self._keep([future for future in self._pending if not future.cancelled()])
        return keys

    def _collect(self) -> None:
        """Wait for at least one answer."""
        done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
        self._keep(done)
        for future in done:
            if (error := future.exception()) is not None:
                raise error
        answers = self._without.total()
        if answers >= _TRIAL_ANSWERS and not self._scored:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self._without.most_common())
            advice = "the judge seems to ignore the JSON schema in response_format"
            if CUT_SHORT in self._without:
                advice = (
                    "they end at max_tokens, which --request '{\"max_tokens\": 512}' raises, or the judge thinks first"
                )
            raise JudgeError(
                f"none of the {answers} answers of {self._client.address} holds a verdict ({reasons}); {advice}. "
                "After a change of the judge run again with --ask-again"
            )

    def _keep(self, futures: Any) -> None:
        entries = []
        for future in futures:
            key = self._pending.pop(future)
            if future.exception() is not None:
                continue
            verdict: Verdict = future.result()
            self.asked += 1
            self.verdicts[key] = verdict
            self.prompt_tokens += verdict.prompt_tokens
            self.completion_tokens += verdict.completion_tokens
            if isinstance(self._client, JudgeClient):
                self._meter.add(
                    api_prompt_tokens=verdict.prompt_tokens, api_completion_tokens=verdict.completion_tokens
                )
            else:
                self._meter.add(tokens=verdict.prompt_tokens + verdict.completion_tokens)
            if verdict.score is not None:
                self._scored += 1
            elif verdict.reason not in UNANSWERED:
                self._without[verdict.reason] += 1
            if verdict.reason not in UNANSWERED:
                entries.append({"key": key, "score": verdict.score, "reason": verdict.reason})
        self._progress.advance(len(futures))
        if entries:
            self._journal.append(entries)


def _refuse_other_scores(config: JudgeConfig) -> None:
    """Keep finished scores that another question or another method made.

    Raises:
        ConfigError: `out` is not what this run would make again.
    """
    if not Path(config.out).exists():
        return
    try:
        manifest = ScoresTable.open(config.out, allow_top=True).manifest
    except DataFormatError as error:
        raise ConfigError(
            f"--out is {config.out!r}, which is there and no scores file; choose another --out"
        ) from error
    details = manifest.get("details") if manifest.get("method") == "judge" else None
    if not isinstance(details, dict):
        raise ConfigError(
            f"{config.out} holds scores of the method {manifest.get('method') or 'cosine'!r}; choose another --out"
        )
    wanted = {
        "behavior": config.load_rubric().behavior,
        "model": config.model,
        "settings": dict(config.settings),
    }
    for name, value in wanted.items():
        if details.get(name) != value:
            raise ConfigError(
                f"{config.out} holds a judge's scores for another {name}: {details.get(name)!r}, expected {value!r}; "
                "choose another --out, or delete it (the answers beside it stay)"
            )


def _replay(journal: Journal) -> Iterator[tuple[str, Verdict]]:
    for entry in journal.entries:
        key, score, reason = (entry.get(name) for name in ("key", "score", "reason"))
        valid = score is None if reason else isinstance(score, int) and LOWEST <= score <= HIGHEST
        if not isinstance(key, str) or not isinstance(reason, str) or not valid:
            raise DataFormatError(f"{journal.path} is damaged: {entry} is no verdict; delete it to start again")
        yield key, Verdict(score, reason)


def _scores(keys: np.ndarray, usable: np.ndarray, verdicts: Mapping[str, Verdict]) -> tuple[np.ndarray, dict[str, int]]:
    """float32 [N], NaN without both verdicts; and the responses without one, by reason."""
    scores = np.full(len(keys), np.nan, np.float32)
    missing: Counter[str] = Counter()
    for row in np.flatnonzero(usable).tolist():
        sides = [verdicts[key.decode()] for key in keys[row]]
        missing.update(verdict.reason for verdict in sides if verdict.score is None)
        chosen, rejected = sides
        if chosen.score is not None and rejected.score is not None:
            scores[row] = chosen.score - rejected.score
    return scores, dict(missing)
