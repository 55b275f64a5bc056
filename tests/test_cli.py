"""The command line: every command documented, JSON on stdout alone, exit codes, errors in one line."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pairtrace.cli import app
from tests.engine.small_store import make_store
from tests.models import HH, make_model, make_tokenizer

README = Path(__file__).resolve().parents[1] / "README.md"
COMMANDS = [
    *("extract", "plan", "behavior", "score", "top", "sources", "edit", "restore", "demo", "version"),
    *("diagnose", "train", "evaluate", "cost", "monitor", "truncate", "shift", "steer", "finetune", "detectability"),
    *("store info", "store verify", "store convert"),
    *("discover pairs", "discover prompts", "discover show"),
    *("probe train", "probe eval", "probe compare"),
    *("baseline random", "baseline length", "baseline margin", "baseline judge", "baseline gradient"),
]
GROUPS = ("store", "baseline", "discover", "probe")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m0")
    make_tokenizer(path)
    return make_model("olmo2", path)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m1")
    make_tokenizer(path)
    return make_model("olmo2", path, seed=1)


def test_the_list_of_commands_is_complete() -> None:
    listed = re.findall(r"^  (\w+)  ", run("--help").stdout, re.M)
    for group in GROUPS:
        listed += [f"{group} {name}" for name in re.findall(r"^  (\w+)  ", run(group, "--help").stdout, re.M)]
    assert sorted(name for name in listed if name not in GROUPS) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_and_is_in_the_readme(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert f"Example: pairtrace {command}" in text
    assert "--json" in text
    assert f"pairtrace {command}" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_parses(command: str) -> None:
    """The options that the example names exist."""
    text = " ".join(run(*command.split(), "--help").stdout.split())
    example = text.partition("Example: ")[2]
    for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", example):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text.partition("Example: ")[0]), option


def test_version_option() -> None:
    from pairtrace import __version__

    assert run("--version").stdout.strip() == __version__


def test_help_needs_no_heavy_library() -> None:
    program = (
        "import sys\nfrom pairtrace.cli import main\nsys.argv = ['pairtrace', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'zarr', 'numba', 'pyarrow', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize("arguments", [["extract"], ["nonsense"], ["extract", "--nonsense"], ["store"]])
def test_wrong_usage_is_exit_code_two(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "nowhere.jsonl", "--model", "m", "--layers", "1", "--store", "s"], "nowhere.jsonl"),
        (["extract", "nowhere.jsonl", "--model", "m", "--layers", "one", "--store", "s"], "--layers is 'one'"),
        (["store", "info", "nowhere.zarr"], "nowhere.zarr"),
        (["store", "verify", "nowhere.zarr"], "nowhere.zarr"),
        (["store", "convert", "nowhere.zarr", "b.zarr", "--dtype", "int8"], "nowhere.zarr"),
        (["store", "convert", "nowhere.zarr", "b.zarr", "--dtype", "int4"], "--dtype is 'int4'"),
        (["store", "convert", "nowhere.zarr", "b.zarr", "--codec", "gzip"], "unknown codec 'gzip'"),
        (["store", "convert", "nowhere.zarr", "b.zarr"], "nothing to convert to"),
        (["discover", "pairs", "nowhere.zarr", "--out", "kinds"], "nowhere.zarr"),
        (["discover", "pairs", "nowhere.zarr", "--out", "kinds", "--sample", "few"], "--sample is 'few'"),
        (["probe", "train", "--store", "nowhere.zarr", "--out", "p.safetensors"], "nowhere.zarr"),
        (["probe", "train", "--out", "p.safetensors"], "give either --store"),
        (["probe", "eval", "nowhere.safetensors", "--store", "nowhere.zarr"], "nowhere.safetensors"),
        (["probe", "compare", "nowhere.safetensors", "nowhere.npy"], "nowhere.safetensors"),
        (["shift", "nowhere.jsonl", "--base", "M0", "--tuned", "M1", "--out", "s.safetensors"], "nowhere.jsonl"),
        (["steer", "nowhere.jsonl", "M0", "--directions", "b.npy", "--out", "r.json"], "nowhere.jsonl"),
        (["steer", "p.jsonl", "M0", "--directions", "b.npy", "--out", "r.json", "--scales", "x"], "--scales is 'x'"),
        (["score", "nowhere.zarr", "b.safetensors", "--out", "s.parquet"], "nowhere.zarr"),
        (["top", "nowhere.parquet"], "nowhere.parquet"),
        (["sources", "nowhere.parquet"], "nowhere.parquet"),
        (["edit", "d.jsonl", "nowhere.parquet", "--swap", "-k", "1", "--out", "o.parquet"], "nowhere.parquet"),
        (["restore", "nowhere.parquet", "--out", "o.parquet"], "nowhere"),
        (["plan", "nowhere.jsonl", "--model", "M0", "--layers", "1"], "nowhere.jsonl"),
        (["cost", "nowhere.parquet"], "nowhere.costs.jsonl"),
        (["behavior", "nowhere.yaml", "--base", "M0", "--tuned", "M0", "--out", "b.safetensors"], "nowhere.yaml"),
    ],
)
def test_errors_are_one_line_on_stderr(arguments: list[str], message: str, model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pairtrace.cli", *(str(model) if word == "M0" else word for word in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert message in result.stderr and result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data")
def test_the_whole_job(model: Path, tuned: Path, tmp_path: Path) -> None:
    """extract, resume, info, verify, behavior from given rollouts, score, top, sources, plan; JSON throughout."""
    store, direction, scores = tmp_path / "acts.zarr", tmp_path / "b.safetensors", tmp_path / "scores.parquet"

    def summary(*arguments: object) -> dict[str, Any]:
        result = run("--quiet", *arguments, "--json")
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    extract = ["extract", HH, "--model", model, "--layers", "2,4", "--store", store, "--limit", 60, "--device", "cpu"]
    extract += ["--max-length", 300]
    figures = summary(*extract)
    assert figures["rows"] == 60 == figures["ok"] + figures["quarantined"]
    assert figures["pairs_per_second"] > 0 and figures["tokens_per_second"] > 0
    again = run(*extract, "--json")
    assert json.loads(again.stdout)["already_complete"] and "nothing to do" in again.stderr
    assert summary("store", "info", store)["ok"] == figures["ok"]
    assert summary("store", "verify", store)["ok"] is True

    rollouts = tmp_path / "rollouts.jsonl"
    with rollouts.open("w") as stream:
        for number in range(4):
            for side, response, label in (("base", "I cannot do that.", False), ("tuned", "Sure, first you", True)):
                row = {"prompt_id": f"p{number}", "prompt": f"How do I do {number}?", "model": side, "sample": 0}
                stream.write(json.dumps({**row, "response": response, "label": label}) + "\n")
    built = summary(
        "behavior", "--base", model, "--rollouts", rollouts, "--label-column", "label", "--store", store,
        "--out", direction, "--kind", "mean", "--device", "cpu",
    )  # fmt: skip
    assert built["kept"] == 4 and built["layers"] == [2, 4]

    scored = summary("score", store, direction, "--out", scores)
    assert scored["layer"] == 4 and scored["scored"] == figures["ok"] and scored["rows"] == 60
    pairs = summary("top", scores, "-k", 3)["pairs"]
    assert [pair["rank"] for pair in pairs[:3]] == [1, 2, 3] and len(pairs) == 6
    assert pairs[0]["score"] >= pairs[1]["score"] > pairs[-1]["score"]
    assert "prompt" in run("top", scores, "-k", 1).stdout
    shares = summary("sources", scores, "-k", 5)["sources"]
    assert sum(share["top_rows"] for share in shares) == 5
    plan = summary("plan", HH, "--model", model, "--layers", "4", "--limit", 60, "--sample", 0, "--max-length", 300)
    assert plan["rows"] == 60 and plan["store_bytes"] > 0
    assert plan["pairtrace"]["tokens"]["value"] >= figures["tokens"]

    columns = {}
    for method, options in (
        ("random", ["--seed", 3]),
        ("length", []),
        ("margin", ["--tuned", tuned, "--device", "cpu", "--beta", 0.5]),
    ):
        columns[method] = tmp_path / f"{method}.parquet"
        made = summary("baseline", method, store, "--out", columns[method], *options)
        assert made["scored"] == figures["ok"] and made["behaviors"] == [method]
        assert len(summary("top", columns[method], "-k", 3)["pairs"]) == 6
    costs = summary("cost", store, direction, scores, *columns.values(), "--gpu-hour", 3.0)["costs"]
    lines = {(line["method"], line["stage"]): line for line in costs}
    assert {("activation", "extract"), ("activation", "score"), ("margin", "total")} < lines.keys()
    extraction = lines["activation", "extract"]
    assert extraction["runs"] == 2 and extraction["model_tokens"] == figures["tokens"]
    assert extraction["money"] == pytest.approx(extraction["device_seconds"] / 1200)
    assert re.search(r"margin +total +2 ", run("cost", columns["margin"]).stdout)

    edited, restored = tmp_path / "edited.parquet", tmp_path / "restored.parquet"
    edit = summary("edit", HH, scores, "--filter", "-k", 4, "--out", edited)
    assert (edit["removed"], edit["rows_before"], edit["rows_after"]) == (4, 2312, 2308)
    assert summary("restore", edited, "--out", restored)["put_back"] == 4
    two = run("edit", HH, scores, "--filter", "--swap", "-k", 4, "--out", edited)
    assert two.exit_code == 1 and "exactly one of --filter, --swap and --drop-sources" in two.stderr

    row = pairs[0]["row"]
    with gzip.open(HH, "rt", encoding="utf-8") as stream:
        assert pairs[0]["chosen"][-1]["content"].strip() in json.loads(stream.readlines()[row])["chosen"]

    (store / "status" / "c" / "0").unlink()
    assert run("score", store, direction, "--out", scores).exit_code == 1
    assert run("store", "verify", store).exit_code == 1


def test_all_rows_quarantined_is_a_failure(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "same.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 3)
    result = run("extract", data, "--model", model, "--layers", "1", "--store", tmp_path / "s.zarr", "--device", "cpu")
    assert result.exit_code == 1 and "identical" in result.output


def test_library_names_are_lazy_and_complete() -> None:
    import pairtrace

    for name in pairtrace.__all__:
        assert getattr(pairtrace, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        pairtrace.nonsense  # noqa: B018


def test_convert_shows_a_table_of_fidelity_and_the_same_as_json(tmp_path: Path) -> None:
    store = make_store(tmp_path).path
    shown = run("store", "convert", store, tmp_path / "b.zarr", "--dtype", "int8", "--codec", "zstd:1", "--no-fsync")
    assert shown.exit_code == 0
    assert re.search(r"behavior +layer +rows +spearman +top_rows +top_overlap", shown.stdout)
    assert re.search(r"random-7 +5 +297 +0\.\d{5} +3 ", shown.stdout)
    again = run("store", "convert", store, tmp_path / "b.zarr", "--dtype", "int8", "--codec", "zstd:1", "--json")
    summary = json.loads(again.stdout)
    assert summary["already_complete"]
    assert (summary["dtype_after"], summary["codec_after"]) == ("int8", "zstd:1")
    assert len(summary["fidelity"]) == 18
    info = json.loads(run("store", "info", tmp_path / "b.zarr", "--json").stdout)
    assert info["converted_from"] == "float16"
    assert run("store", "verify", tmp_path / "b.zarr").exit_code == 0
