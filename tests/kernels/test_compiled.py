"""The note that the first run on a machine compiles."""

from __future__ import annotations

import logging
import threading

import numba
import pytest

from pairtrace.kernels import compiled


def test_compilation_is_noted_once_and_only_where_it_happens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_told", threading.Event())
    caplog.set_level(logging.INFO, logger=compiled.__name__)

    def twice(value: float) -> float:
        return 2 * value

    kernels = [numba.njit(twice), numba.njit(twice)]
    assert [compiled.call(kernel, 4.0) for kernel in kernels] == [8.0, 8.0]
    assert caplog.text.count("compiling the kernels for this machine, once") == 1
    monkeypatch.setattr(compiled, "_told", threading.Event())
    caplog.clear()
    assert compiled.call(kernels[0], 5.0) == 10.0
    assert not caplog.text
