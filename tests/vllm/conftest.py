"""Where the engines of the tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

_SETTING = "VLLM_ENABLE_V1_MULTIPROCESSING"


@pytest.fixture(scope="session", autouse=True)
def engines_in_this_process() -> Iterator[None]:
    """Most of them run in the tests' own process, which spares each the start of two more.

    Not those of a family that vLLM runs by transformers' code (olmo2): it alters the classes for the whole process. And
    not in a process that has used Numba, at whose modules vLLM 0.32 stumbles: those tests come last.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_SETTING, "0")
        yield


@pytest.fixture
def engines_in_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As vLLM does it by itself."""
    from vllm import envs

    envs.disable_envs_cache()
    monkeypatch.setenv(_SETTING, "1")
    yield
    envs.disable_envs_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that need processes of their own come last."""
    items.sort(key=lambda item: "engines_in_processes" in getattr(item, "fixturenames", ()))
