"""What is told, and when, where an engine cannot be started."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pairtrace.engine.vllm.engine import Engine
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.errors import ConfigError, EngineError
from tests.vllm.engines import needs_vllm

pytestmark = needs_vllm


def start(**changes: Any) -> Engine:
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "options": VLLMOptions(), **changes}
    return Engine(Path("model"), purpose="a test", **settings)


@pytest.mark.parametrize("error", [TypeError("'<' not supported"), AssertionError("no"), KeyError("x")])
def test_whatever_vllm_fails_with_is_told(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`--engine-option max_num_seqs='"many"'` is a TypeError of vLLM's. And nobody waits for minutes without a word."""

    def fail(**settings: Any) -> None:
        raise error

    monkeypatch.setattr("vllm.LLM", fail)
    caplog.set_level(logging.INFO, "pairtrace")
    with pytest.raises(EngineError, match="vLLM does not start for a test"):
        start()
    assert any("starting vLLM" in message for message in caplog.messages)


def test_another_device_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.LLM", lambda **settings: pytest.fail("vLLM was started"))
    with pytest.raises(ConfigError, match=r"--device is 'tpu', but the installed vLLM runs on"):
        start(device="tpu")


def test_an_interruption_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though vLLM swallows a KeyboardInterrupt there, and goes on to wait for an engine that is gone."""

    def swallow(**settings: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("vLLM got the interruption, and would swallow it")

    monkeypatch.setattr("vllm.LLM", swallow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
