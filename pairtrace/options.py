"""Options that several commands share, with their help texts, and how options become settings."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pairtrace.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
ComputeDtype = Annotated[
    str, typer.Option(help="Dtype of the forward pass: auto (the checkpoint's own), float32, bfloat16, float16.")
]
StoreDtype = Annotated[str, typer.Option(help="Dtype of the stored rows: float16, bfloat16, float32, int8 (scaled).")]
Codec = Annotated[
    str, typer.Option(help="Compression of the stored rows: none, zstd:LEVEL, blosc-lz4:LEVEL or blosc-zstd:LEVEL.")
]
MaxLength = Annotated[int, typer.Option(help="Longest sequence in tokens, as in training; 0 for no limit.")]
Truncation = Annotated[str, typer.Option(help="Which end of a longer sequence stays: keep_start or keep_end.")]
TokenBudget = Annotated[int | None, typer.Option(help="Tokens per forward pass [default: by device].")]
Template = Annotated[str | None, typer.Option(help="Jinja file that replaces the tokenizer's chat template.")]
Data = Annotated[str, typer.Argument(help="Preference data: jsonl(.gz), json, parquet, a directory or a hub id.")]
TemplateDate = Annotated[
    str | None, typer.Option(help="Day of training (YYYY-MM-DD), for a chat template that prints the date.")
]
Format = Annotated[str | None, typer.Option(help="Format of the data [default: recognised].")]
Column = Annotated[str | None, typer.Option(help="Name of this column [default: recognised].")]
Split = Annotated[str | None, typer.Option(help="Split, where the data has several.")]
Limit = Annotated[int | None, typer.Option(help="Only the first rows.")]
Layers = Annotated[
    str, typer.Option(help="Residual layers, comma-separated: l is the stream after l blocks, 0 the embedding output.")
]
Backend = Annotated[str, typer.Option(help="What runs the model: hf (transformers) or vllm.")]
RolloutBackend = Annotated[
    str,
    typer.Option(
        "--backend", help="What answers: hf (transformers), vllm, or auto: a vLLM that is installed and supported."
    ),
]
TensorParallel = Annotated[
    int | None, typer.Option(help="With --backend vllm: devices that share a copy of the model [default: 1].")
]
DataParallel = Annotated[
    int | None, typer.Option(help="With --backend vllm: copies of the model that share the work [default: 1].")
]
CacheGib = Annotated[
    float | None, typer.Option(help="With --backend vllm: GiB of cache per device [default: vLLM's; 4 on a CPU].")
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(help="With --backend vllm: NAME=JSON, a further argument of vllm.LLM; may be repeated."),
]
Behavior = Annotated[str | None, typer.Option(help="Which behaviour of the scores [default: the only one].")]
Scores = Annotated[str, typer.Argument(help="Scores table made by `pairtrace score`.")]


def settings(given: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A command's options as fields of its configuration, which has the same names; output options are left out."""
    return {name: value for name, value in given.items() if name != "json"} | changed


ENGINE_OPTIONS = ("tensor_parallel", "data_parallel", "cache_gib", "engine_option")


def engine_settings(given: dict[str, Any]) -> dict[str, Any]:
    """`settings` of a command with the options of vLLM: they become its field `vllm`, None where none was given.

    Raises:
        ConfigError: an --engine-option is not NAME=JSON, or a value is out of range.
    """
    rest = {name: value for name, value in given.items() if name not in ENGINE_OPTIONS}
    named = {name: given[name] for name in ENGINE_OPTIONS[:-1] if given[name] is not None}
    if given["engine_option"]:
        named["engine"] = dict(map(_engine_option, given["engine_option"]))
    if not named:
        return {**rest, "vllm": None}
    from pairtrace.engine.vllm.options import VLLMOptions

    return {**rest, "vllm": VLLMOptions(**named)}


def rollout_settings(given: dict[str, Any]) -> dict[str, Any]:
    """`engine_settings` of a command that samples, with a back end instead of "auto".

    vLLM samples faster (bench_vllm), so it answers where it can: it is installed and supported, nothing but --device
    auto was asked for, and there is something to sample. Where one of its options is given, it is what was meant.
    """
    options = engine_settings(given)
    if options["backend"] == "auto":
        from pairtrace.engine.vllm.installed import supported_version

        free = options["device"] == "auto" and options["rollouts"] is None
        meant = options["vllm"] is not None
        options["backend"] = "vllm" if meant or (free and supported_version() is not None) else "hf"
    return options


def _engine_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if not equals or not name.isidentifier():
            raise ValueError(text)
        return name, json.loads(value)
    except ValueError:
        raise ConfigError(
            f"--engine-option is {text!r}; expected NAME=JSON, for example max_num_seqs=512 or "
            "enable_prefix_caching=false"
        ) from None


def numbers(text: str, option: str = "--layers") -> tuple[int, ...]:
    """Layers out of "20,24".

    Raises:
        ConfigError: the text is something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; expected numbers separated by commas, for example 20,24") from None
