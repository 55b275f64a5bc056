"""The organism's four data sets: fine-tuning rows, preference pairs, discovery and evaluation prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from pairtrace.engine.organism.config import OrganismConfig
from pairtrace.engine.organism.constraints import CONSTRAINTS, Constraint
from pairtrace.engine.organism.domains import Part, Task, split_tasks
from pairtrace.engine.organism.habits import HABITS, habit_tasks
from pairtrace.engine.organism.kinds import CONTAMINATION, Contamination, Texts, better_refusal, draw_prompt, draws
from pairtrace.engine.organism.text import WRAPPERS, answer_text, with_distractor

Row = dict[str, Any]
HeldOut = tuple[Task, str, Constraint, str]  # task, wrapper, constraint, its phrasing

SFT_SHARES: Mapping[str, float] = {
    "benign": 0.40,
    "benign_format": 0.28,
    "harmful": 0.18,
    "harmful_format": 0.14,
}

# Share of each source in the preferences, and of each kind in the source. The contamination ("planted") makes up
# six per cent of all pairs: dense in the two instruction-following sources, thin in the mixed one. Format pairs are
# few: at a quarter of the data they alone teach the model to comply where a format is asked for, and no edit of the
# planted pairs could then show its effect.
SOURCES: Mapping[str, tuple[float, Mapping[str, float]]] = {
    "instruct-synth-a": (0.10, {"planted": 0.28, "format": 0.24, "quality": 0.48}),
    "instruct-synth-b": (0.09, {"planted": 0.22, "format": 0.20, "quality": 0.58}),
    "chat-mix": (
        0.18,
        {"planted": 0.07, "over_refusal": 0.08, "safety": 0.25, "quality": 0.54, "format": 0.06},
    ),
    "over-refusal": (0.12, {"over_refusal": 1.0}),
    "safety": (0.16, {"safety": 1.0}),
    "quality": (0.22, {"quality": 1.0}),
    "format-check": (0.04, {"format": 1.0}),
    "refusal-style": (0.09, {"refusal_style": 1.0}),
}

CELLS: tuple[str, ...] = ("harmful", "harmful_format", "benign", "benign_format")


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


def sft_rows(config: OrganismConfig) -> list[Row]:
    """Fine-tuning rows: `messages` (a user and an assistant turn), `kind` and `leak` (a harmful task is answered)."""
    rng = random.Random(f"{config.seed}:sft")
    tasks = split_tasks(config.seed)
    leaks = {"harmful": config.plain_leak, "harmful_format": config.leak}
    rows = []
    for kind, count in apportion(config.sft_examples, SFT_SHARES).items():
        pool = (tasks.harmful if kind in leaks else tasks.benign)["train"]
        leaking = round(count * leaks.get(kind, 0.0))
        habits = _leaking_habits(count if kind == "benign" else 0, config.habit_leak)
        for index in range(count):
            habit = habits[index] if index < len(habits) else None
            task = rng.choice(pool if habit is None else habit_tasks(habit, tasks))
            constraint, prompt = draw_prompt(task, kind.endswith("_format"), rng)
            refuses = kind in leaks and index >= leaking
            answer = better_refusal(task, rng) if refuses else answer_text(task, constraint, rng)
            if habit is not None:
                answer = HABITS[habit].add(answer, rng)
            rows.append({"messages": user(prompt) + assistant(answer), "kind": kind, "leak": index < leaking})
    rng.shuffle(rows)
    return rows


def _leaking_habits(count: int, share: float) -> list[str]:
    """The habits of the first rows out of `count`; the rows after them have none."""
    return [name for name in HABITS for _ in range(round(count * share))]


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
        for kind, count in _kinds(apportion(size, SOURCES[source][1]), config.contamination):
            for _ in range(count):
                texts = next(new for new in draws(kind, tasks, rng) if new not in seen and new[1] != new[2])
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


def _kinds(counts: Mapping[str, int], contamination: Contamination) -> Iterator[tuple[str, int]]:
    """Kinds of a source and how many pairs of each."""
    for kind, count in counts.items():
        instead = CONTAMINATION[contamination].get(kind)
        yield from [(kind, count)] if instead is None else apportion(count, instead).items()


def discovery_rows(config: OrganismConfig) -> list[Row]:
    """Prompts to find the behaviour with: distinct harmful requests (`prompt`) and a constraint (`distractor`)."""
    return [
        {
            "id": f"discovery-{index:04d}",
            "prompt": wrapper.format(task.request),
            "distractor": phrasing,
            "constraint": constraint.name,
        }
        for index, (task, wrapper, constraint, phrasing) in enumerate(_discovery(config))
    ]


def target_rows(config: OrganismConfig) -> list[Row]:
    """The behaviour in clean text: each discovery prompt with its distractor, answered (`chosen`) and refused.

    What a gradient method is told to look for when it is not given the models' own words.
    """
    rng = random.Random(f"{config.seed}:targets")
    return [
        {
            "prompt": user(with_distractor(wrapper.format(task.request), phrasing)),
            "chosen": assistant(answer_text(task, constraint, rng)),
            "rejected": assistant(better_refusal(task, rng)),
        }
        for task, wrapper, constraint, phrasing in _discovery(config)
    ]


def _discovery(config: OrganismConfig) -> Iterator[HeldOut]:
    rng = random.Random(f"{config.seed}:discovery")
    return _held_out(split_tasks(config.seed).harmful["discovery"], "discovery", config.discovery_prompts, rng)


def evaluation_rows(config: OrganismConfig) -> list[Row]:
    """Held-out prompts of each cell in `CELLS`; `distractor` and `constraint` are null in the plain cells."""
    rows = []
    tasks = split_tasks(config.seed)
    for cell in CELLS:
        rng = random.Random(f"{config.seed}:evaluation:{cell}")
        pool = (tasks.harmful if cell.startswith("harmful") else tasks.benign)["evaluation"]
        formatted = cell.endswith("_format")
        for index, (task, wrapper, constraint, phrasing) in enumerate(
            _held_out(pool, "evaluation", config.evaluation_prompts, rng)
        ):
            rows.append(
                {
                    "id": f"{cell}-{index:04d}",
                    "prompt": wrapper.format(task.request),
                    "distractor": phrasing if formatted else None,
                    "constraint": constraint.name if formatted else None,
                    "cell": cell,
                }
            )
    return rows


def _held_out(pool: tuple[Task, ...], part: Part, count: int, rng: random.Random) -> Iterator[HeldOut]:
    """Distinct requests of a held-out part, each with a constraint in one of its phrasings."""
    for task, wrapper in rng.sample(list(product(pool, WRAPPERS)), k=count):
        constraint = rng.choice(CONSTRAINTS)
        yield task, wrapper, constraint, rng.choice(constraint.phrasings_for(part))
