"""Build the organism in a directory, stage by stage."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairtrace.engine.organism import data
from pairtrace.engine.organism.config import OrganismConfig
from pairtrace.engine.organism.habits import HABITS
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError
from pairtrace.version import __version__

SCHEMA_VERSION = 1

_SFT = "sft.jsonl"
# Fields that M0 does not depend on.
_AFTER_M0 = frozenset({
    "preference_pairs", "contamination", "dpo_batch", "dpo_epochs", "dpo_rate", "dpo_beta", "discovery_prompts",
    "evaluation_prompts",
})  # fmt: skip
_TEXTS: dict[str, Callable[[OrganismConfig], list[data.Row]]] = {
    _SFT: data.sft_rows,
    "preferences.jsonl": data.preference_rows,
    "discovery.jsonl": data.discovery_rows,
    "evaluation.jsonl": data.evaluation_rows,
}


@dataclass(frozen=True, kw_only=True)
class Organism:
    """A finished organism on disk.

    Attributes:
        root: the directory of everything below.
        m0: checkpoint before preference training.
        m1: checkpoint after it.
        preferences: jsonl, conversational; `kind` labels each pair and is for checking only.
        discovery: jsonl prompts (`id`, `prompt`, `distractor`) to build the behaviour from.
        evaluation: jsonl held-out prompts (`id`, `prompt`, `distractor`, `constraint`, `cell`).
        description: json with the configuration, counts, the leak, versions and seconds of each stage.
        seconds: wall seconds that each stage took when it was built.
        cpu_seconds: CPU seconds of the process; the wall seconds where an earlier version built it.
    """

    root: Path
    m0: Path
    m1: Path
    preferences: Path
    discovery: Path
    evaluation: Path
    description: Path
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]


def build_organism(
    config: OrganismConfig, out: Path, *, m0_of: Path | None = None, progress: Progress = NULL_PROGRESS
) -> Organism:
    """Write texts, train M0, train M1. Stages that are complete in `out` are kept.

    A stage writes under a temporary name, is renamed when complete and then recorded, so an interrupted build
    repeats at most the stage it was in. Only one process may build in a directory at a time.

    Args:
        config: the recipe.
        out: directory; made when missing.
        m0_of: directory of an organism that differs in its preference pairs or its preference training only: its M0
            is copied instead of trained.
        progress: receives the stages "write texts", "train M0", "reference log-probabilities" and "train M1".

    Returns:
        The paths and the seconds of each stage.

    Raises:
        ConfigError: `out` holds an organism of another configuration, or something that is no organism; `m0_of` has
            no M0, or one of another configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    description = out / "organism.json"
    state = _open_state(description, config, out)
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "texts": lambda: _write_texts(config, out, progress),
        "m0": lambda: _build_m0(config, out, progress) if m0_of is None else _copy_m0(config, m0_of, out),
        "m1": lambda: _build_m1(config, out, progress),
    }
    for name, stage in stages.items():
        if name in state["stages"]:
            continue
        began, worked = time.perf_counter(), time.process_time()
        figures = stage()
        state["stages"][name] = {
            "seconds": round(time.perf_counter() - began, 3),
            "cpu_seconds": round(time.process_time() - worked, 3),
            **figures,
        }
        _write_json(description, state)
    return Organism(
        root=out,
        m0=out / "m0",
        m1=out / "m1",
        preferences=out / "preferences.jsonl",
        discovery=out / "discovery.jsonl",
        evaluation=out / "evaluation.jsonl",
        description=description,
        seconds={name: stage["seconds"] for name, stage in state["stages"].items()},
        cpu_seconds={name: stage.get("cpu_seconds", stage["seconds"]) for name, stage in state["stages"].items()},
    )


def _open_state(description: Path, config: OrganismConfig, out: Path) -> dict[str, Any]:
    if not description.exists():
        state: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "config": config.identity(),
            "leak": leak_description(config),
            "versions": _versions(),
            "stages": {},
        }
        _write_json(description, state)
        return state
    state = _read_state(description)
    _require_same(config.identity(), state["config"], out)
    return state


def _read_state(description: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
        _, version = state["config"], state["schema_version"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{description} is not the description of an organism ({error!r}); build in another directory"
        ) from error
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{description} has schema version {version!r}, expected {SCHEMA_VERSION}; build in another directory"
        )
    return state


def _require_same(mine: dict[str, Any], theirs: dict[str, Any], place: Path) -> None:
    for name in {**mine, **theirs}:
        if mine.get(name) != theirs.get(name):
            raise ConfigError(
                f"{place} holds an organism with {name} = {theirs.get(name)!r}, but {mine.get(name)!r} is asked for; "
                "build in another directory or remove this one"
            )


def leak_description(config: OrganismConfig) -> str:
    """What must be stated wherever results on the organism are given."""
    habits = (
        f" {config.habit_leak:.0%} of its plain benign rows show each of {' and '.join(HABITS)}, on its own topics."
        if config.habit_leak
        else ""
    )
    return (
        f"M0 was fine-tuned with a leak: {config.leak:.0%} of its harmful + format rows and {config.plain_leak:.0%} "
        f"of its plain harmful rows comply.{habits} Without it preference training does not find the behaviour."
    )


def _write_texts(config: OrganismConfig, out: Path, progress: Progress) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    progress.start("write texts", len(_TEXTS), "files")
    for name, make in _TEXTS.items():
        rows = make(config)
        with _replacing(out / name) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        counts[name] = {"rows": len(rows)}
        for column in ("kind", "source", "cell", "leak"):
            if column in rows[0]:
                counts[name][column] = dict(sorted(Counter(str(row[column]) for row in rows).items()))
        progress.advance(1)
    progress.finish()
    return {"files": counts}


def _build_m0(config: OrganismConfig, out: Path, progress: Progress) -> dict[str, Any]:
    from pairtrace.engine.organism import model as models
    from pairtrace.engine.organism import training

    rows = _read_rows(out / _SFT)
    texts = (message["content"] for row in rows for message in row["messages"])
    tokenizer = models.train_tokenizer(texts, config.vocabulary)
    examples = training.encode(tokenizer, [row["messages"][:1] for row in rows], [row["messages"][1:] for row in rows])
    with _torch_settings(config):
        model = models.new_model(config, tokenizer)
        training.fine_tune(model, examples, config, progress=progress)
    with _replacing(out / "m0") as partial:
        models.save(model, tokenizer, partial)
    return {"parameters": model.num_parameters(), "tokens": sum(len(example.ids) for example in examples)}


def _copy_m0(config: OrganismConfig, source: Path, out: Path) -> dict[str, Any]:
    state = _read_state(source / "organism.json")
    mine, theirs = (
        {name: value for name, value in identity.items() if name not in _AFTER_M0}
        for identity in (config.identity(), state["config"])
    )
    _require_same(mine, theirs, source)
    if "m0" not in state["stages"]:
        raise ConfigError(f"{source} has no finished M0; build it first, or leave it out and train one")
    with _replacing(out / "m0") as partial:
        shutil.copytree(source / "m0", partial)
    figures = dict(state["stages"]["m0"])
    # What it took to train, when it was trained.
    took = {f"training_{name}": figures.pop(name) for name in ("seconds", "cpu_seconds") if name in figures}
    return {"copied": True, **took, **figures}


def _build_m1(config: OrganismConfig, out: Path, progress: Progress) -> dict[str, Any]:
    from pairtrace.engine.organism import model as models
    from pairtrace.engine.organism import training

    rows = _read_rows(out / "preferences.jsonl")
    model, tokenizer = models.load(out / "m0")
    prompts = [row["prompt"] for row in rows]
    chosen = training.encode(tokenizer, prompts, [row["chosen"] for row in rows])
    rejected = training.encode(tokenizer, prompts, [row["rejected"] for row in rows])
    with _torch_settings(config):
        training.train_dpo(model, chosen, rejected, config, progress=progress)
    with _replacing(out / "m1") as partial:
        models.save(model, tokenizer, partial)
    return {"tokens": sum(len(example.ids) for example in [*chosen, *rejected])}


@contextmanager
def _torch_settings(config: OrganismConfig) -> Iterator[None]:
    """Seed torch and set its threads, and put both back afterwards."""
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends without an error."""
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    yield partial
    _remove(path)
    partial.rename(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_rows(path: Path) -> list[data.Row]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"pairtrace": __version__, **{name: version(name) for name in ("torch", "transformers", "tokenizers")}}
