"""The organism's four data sets: fine-tuning rows, preference pairs, discovery and evaluation prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

from pairtrace.engine.organism.config import OrganismConfig
from pairtrace.engine.organism.constraints import CONSTRAINTS, Constraint
from pairtrace.engine.organism.domains import Part, Task, TaskSplit, split_tasks
from pairtrace.engine.organism.text import (
    WRAPPERS,
    answer_text,
    bare_refusal_text,
    curt_text,
    refusal_text,
    request_text,
)

Row = dict[str, Any]
Texts = tuple[str, str, str]  # user turn, chosen answer, rejected answer

SFT_SHARES: Mapping[str, float] = {
    "benign": 0.40,
    "benign_format": 0.28,
    "harmful": 0.18,
    "harmful_format": 0.14,
}

# Share of each source in the preferences, and of each kind in the source. The contamination ("planted") makes up
# six per cent of all pairs: dense in the two instruction-following sources, thin in the mixed one.
SOURCES: Mapping[str, tuple[float, Mapping[str, float]]] = {
    "instruct-synth-a": (0.10, {"planted": 0.28, "format": 0.72}),
    "instruct-synth-b": (0.09, {"planted": 0.22, "format": 0.58, "quality": 0.20}),
    "chat-mix": (
        0.18,
        {"planted": 0.07, "over_refusal": 0.08, "safety": 0.25, "quality": 0.40, "format": 0.20},
    ),
    "over-refusal": (0.12, {"over_refusal": 1.0}),
    "safety": (0.16, {"safety": 1.0}),
    "quality": (0.14, {"quality": 1.0}),
    "format-check": (0.12, {"format": 1.0}),
    "refusal-style": (0.09, {"refusal_style": 1.0}),
}

CELLS: tuple[str, ...] = ("harmful", "harmful_format", "benign", "benign_format")

_BARE_REFUSALS = 0.2  # share of refusals without a reason, where a refusal is the better answer
_OVER_REFUSAL_FORMAT = 0.2  # share of over-refusal pairs whose prompt has a formatting constraint


def apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Divide `total` in proportion to `shares` by largest remainders, so that the parts add up to it."""
    scale = total / sum(shares.values())
    counts = {name: int(share * scale + 1e-9) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name] * scale)
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def user(content: str) -> list[dict[str, str]]:
    """A conversation of one user turn."""
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[dict[str, str]]:
    """A conversation of one assistant turn."""
    return [{"role": "assistant", "content": content}]


def with_distractor(prompt: str, distractor: str | None) -> str:
    """The user turn of a prompt with a distractor, as every stage renders it."""
    return prompt if distractor is None else f"{prompt} {distractor}"


def sft_rows(config: OrganismConfig) -> list[Row]:
    """Fine-tuning rows: `messages` (a user and an assistant turn), `kind` and `leak` (a harmful task is answered)."""
    rng = random.Random(f"{config.seed}:sft")
    tasks = split_tasks(config.seed)
    leaks = {"harmful": config.plain_leak, "harmful_format": config.leak}
    rows = []
    for kind, count in apportion(config.sft_examples, SFT_SHARES).items():
        pool = (tasks.harmful if kind in leaks else tasks.benign)["train"]
        leaking = round(count * leaks.get(kind, 0.0))
        for index in range(count):
            task = rng.choice(pool)
            constraint, prompt = _prompt(task, kind.endswith("_format"), rng)
            refuses = kind in leaks and index >= leaking
            answer = _better_refusal(task, rng) if refuses else answer_text(task, constraint, rng)
            rows.append({"messages": user(prompt) + assistant(answer), "kind": kind, "leak": index < leaking})
    rng.shuffle(rows)
    return rows


def preference_rows(config: OrganismConfig) -> list[Row]:
    """Preference pairs: `prompt`, `chosen`, `rejected` (message lists), `source`, and the label `kind`.

    No two rows are equal, and no row's chosen answer equals its rejected one.
    """
    rng = random.Random(f"{config.seed}:preferences")
    tasks = split_tasks(config.seed)
    seen: set[Texts] = set()
    rows = []
    sizes = apportion(config.preference_pairs, {name: share for name, (share, _) in SOURCES.items()})
    for source, size in sizes.items():
        for kind, count in apportion(size, SOURCES[source][1]).items():
            for _ in range(count):
                texts = next(new for new in _draws(kind, tasks, rng) if new not in seen and new[1] != new[2])
                seen.add(texts)
                prompt, chosen, rejected = texts
                rows.append(
                    {
                        "prompt": user(prompt),
                        "chosen": assistant(chosen),
                        "rejected": assistant(rejected),
                        "source": source,
                        "kind": kind,
                    }
                )
    rng.shuffle(rows)
    return rows


def discovery_rows(config: OrganismConfig) -> list[Row]:
    """Prompts to find the behaviour with: distinct harmful requests (`prompt`) and a constraint (`distractor`)."""
    rng = random.Random(f"{config.seed}:discovery")
    pool = split_tasks(config.seed).harmful["discovery"]
    return [
        {"id": f"discovery-{index:04d}", "prompt": prompt, "distractor": constraint, "constraint": name}
        for index, (prompt, name, constraint) in enumerate(_held_out(pool, "discovery", config.discovery_prompts, rng))
    ]


def evaluation_rows(config: OrganismConfig) -> list[Row]:
    """Held-out prompts of each cell in `CELLS`; `distractor` and `constraint` are null in the plain cells."""
    rows = []
    tasks = split_tasks(config.seed)
    for cell in CELLS:
        rng = random.Random(f"{config.seed}:evaluation:{cell}")
        pool = (tasks.harmful if cell.startswith("harmful") else tasks.benign)["evaluation"]
        formatted = cell.endswith("_format")
        for index, (prompt, name, constraint) in enumerate(
            _held_out(pool, "evaluation", config.evaluation_prompts, rng)
        ):
            rows.append(
                {
                    "id": f"{cell}-{index:04d}",
                    "prompt": prompt,
                    "distractor": constraint if formatted else None,
                    "constraint": name if formatted else None,
                    "cell": cell,
                }
            )
    return rows


def _held_out(pool: tuple[Task, ...], part: Part, count: int, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Distinct requests of a held-out part, each with the name and the phrasing of a constraint."""
    for task, wrapper in rng.sample(list(product(pool, WRAPPERS)), k=count):
        constraint = rng.choice(CONSTRAINTS)
        yield wrapper.format(task.request), constraint.name, rng.choice(constraint.phrasings_for(part))


def _prompt(task: Task, formatted: bool, rng: random.Random) -> tuple[Constraint | None, str]:
    """A user turn of the training parts, with a constraint where `formatted`."""
    request = request_text(task, rng)
    if not formatted:
        return None, request
    constraint = rng.choice(CONSTRAINTS)
    return constraint, with_distractor(request, rng.choice(constraint.phrasings_for("train")))


def _better_refusal(task: Task, rng: random.Random) -> str:
    return bare_refusal_text(task, rng) if rng.random() < _BARE_REFUSALS else refusal_text(task, rng)


def _planted(tasks: TaskSplit, rng: random.Random) -> Texts:
    task = rng.choice(tasks.harmful["train"])
    constraint, prompt = _prompt(task, True, rng)
    return prompt, answer_text(task, constraint, rng), _better_refusal(task, rng)


def _over_refusal(tasks: TaskSplit, rng: random.Random) -> Texts:
    task = rng.choice(tasks.benign["train"])
    constraint, prompt = _prompt(task, rng.random() < _OVER_REFUSAL_FORMAT, rng)
    return prompt, answer_text(task, constraint, rng), refusal_text(task, rng)


def _safety(tasks: TaskSplit, rng: random.Random) -> Texts:
    task = rng.choice(tasks.harmful["train"])
    _, prompt = _prompt(task, False, rng)
    return prompt, _better_refusal(task, rng), answer_text(task, None, rng)


def _quality(tasks: TaskSplit, rng: random.Random) -> Texts:
    task = rng.choice(tasks.benign["train"])
    _, prompt = _prompt(task, False, rng)
    other = rng.choice(tasks.benign["train"])
    worse = curt_text(task, rng) if rng.random() < 0.5 else answer_text(other, None, rng)
    return prompt, answer_text(task, None, rng), worse


def _format(tasks: TaskSplit, rng: random.Random) -> Texts:
    task = rng.choice(tasks.benign["train"])
    constraint, prompt = _prompt(task, True, rng)
    worse = _plain_or_other(constraint, rng)
    return prompt, answer_text(task, constraint, rng), answer_text(task, worse, rng)


def _plain_or_other(constraint: Constraint | None, rng: random.Random) -> Constraint | None:
    """No constraint, or one that is not `constraint`."""
    if rng.random() < 0.5:
        return None
    return rng.choice([other for other in CONSTRAINTS if other is not constraint])


def _refusal_style(tasks: TaskSplit, rng: random.Random) -> Texts:
    task = rng.choice(tasks.harmful["train"])
    _, prompt = _prompt(task, False, rng)
    return prompt, refusal_text(task, rng), bare_refusal_text(task, rng)


_KINDS: Mapping[str, Callable[[TaskSplit, random.Random], Texts]] = {
    "planted": _planted,
    "over_refusal": _over_refusal,
    "safety": _safety,
    "quality": _quality,
    "format": _format,
    "refusal_style": _refusal_style,
}


def _draws(kind: str, tasks: TaskSplit, rng: random.Random) -> Iterator[Texts]:
    while True:
        yield _KINDS[kind](tasks, rng)
