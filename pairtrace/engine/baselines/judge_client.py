"""Questions to an OpenAI-compatible server: time limits, repetition with growing pauses, and when to give up."""

from __future__ import annotations

import email.utils
import json
import logging
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException, HTTPMessage
from typing import IO, Any, TypeVar
from urllib.parse import urlparse

from pairtrace.engine.baselines.judge_request import Verdict, read_verdict
from pairtrace.errors import ConfigError, JudgeError

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# Reasons why a question got no answer; asked again by the next run, unlike an answer without a verdict.
TIMEOUT, NO_CONNECTION, RATE_LIMIT, SERVER_ERROR = "timeout", "no_connection", "rate_limit", "server_error"
REQUEST_REFUSED = "request_refused"
UNANSWERED = frozenset({TIMEOUT, NO_CONNECTION, RATE_LIMIT, SERVER_ERROR, REQUEST_REFUSED})

# Statuses that no repetition mends and that every further question would meet as well.
_HOPELESS = {
    301: "it points to another address",
    302: "it points to another address",
    307: "it points to another address",
    308: "it points to another address",
    401: "the key is missing or wrong; see --api-key-env",
    403: "the key may not use this model",
    404: "there is no such address or model; see --base-url and --model",
    405: "there is no such address; see --base-url",
}
_LARGEST_ANSWER = 1 << 22
_LONGEST_PAUSE = 60.0
_LONGEST_ASKED_PAUSE = 900.0


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the judge is and how patiently it is asked.

    Attributes:
        base_url: address up to and with the version, such as http://localhost:8000/v1.
        api_key: sent as a bearer token; None sends none.
        timeout: seconds for one answer, from connecting to its last byte.
        attempts: how often a question is asked that fails for a passing reason.
        pause: seconds before the second attempt; doubled for each further one, up to a minute. What the server asks
            for with Retry-After counts instead, up to 15 minutes.
        max_failures: questions in a row without an answer after which the server is given up. A question counts only
            if no other one was answered while it was under way: else the server is not dead, but this question hangs.
    """

    base_url: str
    api_key: str | None = None
    timeout: float = 120.0
    attempts: int = 5
    pause: float = 1.0
    max_failures: int = 8

    def __post_init__(self) -> None:
        address = urlparse(self.base_url)
        if address.scheme not in ("http", "https") or not address.netloc:
            raise ConfigError(f"--base-url is {self.base_url!r}; expected an address like http://localhost:8000/v1")
        for name, least in (("timeout", 0.001), ("attempts", 1), ("pause", 0.0), ("max_failures", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} of the judge is {getattr(self, name)}; expected at least {least}")

    def __repr__(self) -> str:
        """Without the key: settings end up in logs and tracebacks."""
        return f"ServerConfig(base_url={self.base_url!r}, timeout={self.timeout}, attempts={self.attempts})"


def read_api_key(variable: str | None) -> str | None:
    """The key in an environment variable; None for None.

    Raises:
        ConfigError: the variable holds no key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"the environment variable {variable} of --api-key-env holds no key; set it, or leave the option out for a "
            "server without keys"
        )
    return key


class _AttemptError(Exception):
    """One attempt failed; `wait` is the pause that the server asked for, in seconds."""

    def __init__(self, reason: str, detail: str, *, again: bool = True, wait: float | None = None) -> None:
        super().__init__(detail)
        self.reason, self.again, self.wait = reason, again, wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address, and turn the question into a GET."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


class JudgeClient:
    """Asks questions; may be used by several threads, which share the pauses and the count of failures."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.address = config.base_url.rstrip("/") + "/chat/completions"
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._not_before = 0.0
        self._failures = 0
        self._answers = 0

    def stop(self) -> None:
        """End every pause; questions that have not been asked get no answer."""
        self._stopped.set()

    def ask(self, body: dict[str, Any]) -> Verdict:
        """One question about a response; the verdict, or its absence with the reason.

        Raises:
            JudgeError: as for `answer`.
        """
        found = self.answer(body, read_verdict)
        return Verdict(None, found) if isinstance(found, str) else found

    def answer(self, body: dict[str, Any], read: Callable[[Any], Answer]) -> Answer | str:
        """One question of any kind, repeated while that may help.

        Args:
            body: the request to `/chat/completions`.
            read: makes something of the decoded answer; its result is no string.

        Returns:
            What `read` made of the answer; or the reason, one of `UNANSWERED`, why there was none.

        Raises:
            JudgeError: the server refuses every question, or has not answered the last `max_failures` of them.
        """
        failure = _AttemptError(NO_CONNECTION, "the run was stopped", again=False)
        with self._lock:
            answers_before = self._answers
        for attempt in range(self.config.attempts):
            if not self._wait():
                break
            try:
                found = read(self._post(body))
            except _AttemptError as error:
                failure = error
                if not error.again:
                    break
                if attempt + 1 < self.config.attempts:
                    self._pause(attempt, error)
            else:
                with self._lock:
                    self._failures = 0
                    self._answers += 1
                return found
        self._count(failure, answers_before)
        return failure.reason

    def _wait(self) -> bool:
        """Until the common pause is over; False when the run has been stopped."""
        while not self._stopped.is_set():
            with self._lock:
                left = self._not_before - time.monotonic()
            if left <= 0:
                return True
            self._stopped.wait(left)
        return False

    def _pause(self, attempt: int, failure: _AttemptError) -> None:
        if failure.wait is not None:
            # The server speaks of all questions, not only of this one.
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + failure.wait)
            return
        # Full jitter keeps the threads from coming back all at once.
        longest = min(_LONGEST_PAUSE, self.config.pause * 2**attempt)
        self._stopped.wait(random.uniform(longest / 2, longest))

    def _count(self, failure: _AttemptError, answers_before: int) -> None:
        with self._lock:
            # A server that answers others refuses this question, because it is too long for instance.
            if self._stopped.is_set() or (failure.reason == REQUEST_REFUSED and self._answers):
                return
            # Questions that hang run out of time together, long after the others were answered.
            if self._answers > answers_before:
                return
            self._failures += 1
            if self._failures < self.config.max_failures:
                logger.debug("no answer from the judge (%s): %s", failure.reason, failure)
                return
            self._stopped.set()
        raise JudgeError(
            f"{self.address} has not answered {self.config.max_failures} questions in a row; the last one: "
            f"{failure.reason}, {failure}. The verdicts so far are kept: run the same command again to go on, with a "
            "larger --max-failures if the server does answer others"
        )

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.config.api_key is not None:
            headers["Authorization"] = f"Bearer {self.config.api_key}"
        request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.config.timeout
        try:
            with self._opener.open(request, timeout=self.config.timeout) as response:
                text = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._http_failure(error, _detail(error)) from error
        except TimeoutError as error:
            raise _AttemptError(TIMEOUT, f"no answer within {self.config.timeout:g} s") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _AttemptError(TIMEOUT, f"no connection within {self.config.timeout:g} s") from error
            raise _AttemptError(NO_CONNECTION, str(error.reason)) from error
        except (OSError, HTTPException) as error:
            raise _AttemptError(NO_CONNECTION, f"{type(error).__name__}: {error}") from error
        try:
            return json.loads(text)
        except ValueError as error:
            raise _AttemptError(SERVER_ERROR, f"the answer is not JSON: {text[:200]!r}") from error

    def _http_failure(self, error: urllib.error.HTTPError, detail: str) -> _AttemptError:
        status = error.code
        if status in _HOPELESS:
            self._stopped.set()
            raise JudgeError(
                f"{self.address} refuses every question with status {status}: {_HOPELESS[status]} ({detail})"
            ) from error
        if status == 429:
            return _AttemptError(RATE_LIMIT, detail, wait=_retry_after(error.headers.get("Retry-After")))
        if status >= 500 or status == 408:
            return _AttemptError(
                SERVER_ERROR, f"status {status}: {detail}", wait=_retry_after(error.headers.get("Retry-After"))
            )
        return _AttemptError(REQUEST_REFUSED, f"status {status}: {detail}", again=False)


def _read(response: Any, deadline: float) -> bytes:
    """The whole answer; the socket's own limit is for each packet only."""
    parts: list[bytes] = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if sum(map(len, parts)) > _LARGEST_ANSWER:
            raise _AttemptError(SERVER_ERROR, f"the answer is longer than {_LARGEST_ANSWER} bytes", again=False)
    return b"".join(parts)


def _detail(error: urllib.error.HTTPError) -> str:
    """The beginning of what the server says about the error."""
    try:
        return error.read(300).decode("utf-8", "replace").strip() or str(error.reason)
    except (OSError, HTTPException):
        return str(error.reason)


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header: a number, or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (moment - datetime.now(UTC)).total_seconds()
    return None if math.isnan(seconds) else min(max(0.0, seconds), _LONGEST_ASKED_PAUSE)
