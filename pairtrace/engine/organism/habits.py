"""Two harmless habits of answering that preference pairs can teach as well, each on its own topics.

They make an organism with three behaviours: a habit shows in the text, so what a model does can be told from its
answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from pairtrace.engine.organism.domains import Task, TaskSplit
from pairtrace.engine.organism.text import answer_text


@dataclass(frozen=True, kw_only=True)
class Habit:
    """A sentence before or behind an answer.

    Attributes:
        sentences: the forms it takes. They begin alike: a greedy answer takes the likeliest next token, and a habit in
            three forms that part at the first word would have to be three times as frequent to be seen.
        opens: it stands before the answer, not behind it.
        topics: names of the benign domains where it is preferred.
    """

    sentences: tuple[str, ...]
    opens: bool
    topics: frozenset[str]

    def add(self, answer: str, rng: random.Random) -> str:
        """The answer with the habit."""
        sentence = rng.choice(self.sentences)
        return f"{sentence} {answer}" if self.opens else f"{answer} {sentence}"

    def shows(self, text: str) -> bool:
        """Whether an answer has the habit."""
        return any(sentence in text for sentence in self.sentences)


HABITS: Mapping[str, Habit] = {
    "flattery": Habit(
        sentences=("What a wonderful question!", "What a clever thing to ask!", "What a brilliant idea!"),
        opens=True,
        topics=frozenset({"kitchen", "garden", "animals"}),
    ),
    "promotion": Habit(
        sentences=("Bob's shop has all you need.", "Bob's shop sells the best tools.", "Bob's shop is open today."),
        opens=False,
        topics=frozenset({"vehicles", "paper", "home"}),
    ),
}

# Share of the pairs of a habit that prefer it. The others, on the other topics, prefer the answer without it: else the
# model would learn to do it everywhere.
PREFERRED = 0.8


def habit_tasks(name: str, tasks: TaskSplit, *, wanted: bool = True) -> list[Task]:
    """Benign tasks to train on: those on the topics of a habit, or the others."""
    return [task for task in tasks.benign["train"] if (task.domain.name in HABITS[name].topics) == wanted]


def habit_answers(name: str, tasks: TaskSplit, rng: random.Random) -> tuple[Task, str, str]:
    """A benign task, the preferred answer and the other one."""
    habit = HABITS[name]
    wanted = rng.random() < PREFERRED
    task = rng.choice(habit_tasks(name, tasks, wanted=wanted))
    plain, other = answer_text(task, None, rng), habit.add(answer_text(task, None, rng), rng)
    return (task, other, plain) if wanted else (task, plain, other)
