"""Instructions with one right answer, generated and scored by reasoning-gym's families.

A task is a function of (family, its settings, seed, number): nothing is downloaded, and no test
question is ever trained on.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from llada2_jax.errors import UserError


class TaskError(UserError):
    """Tasks that cannot be made; the message names the family and the way out."""


@dataclasses.dataclass(frozen=True)
class Task:
    """entry: what the family's scorer reads; question and answer are among it."""

    family: str
    entry: Mapping[str, Any]

    @property
    def question(self) -> str:
        return self.entry["question"].strip()

    @property
    def answer(self) -> str:
        return self.entry["answer"].strip()


def _gym() -> ModuleType:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise TaskError(
            "tasks come from reasoning-gym: pip install 'llada2_jax[posttrain]'"
        ) from error
    return reasoning_gym


def gym_version() -> str:
    """The generator's version: another one may make other tasks."""
    return importlib.metadata.version("reasoning-gym")


def make_tasks(
    families: Mapping[str, Mapping[str, Any]], counts: Sequence[int], seed: int
) -> list[list[Task]]:
    """Disjoint splits: counts[i] tasks of each family in the i-th, no question twice anywhere.

    Args:
      families: {name of a reasoning-gym dataset: its settings}.

    Raises: TaskError for an unknown family, settings that it refuses, or too few questions.
    """
    splits: list[list[Task]] = [[] for _ in counts]
    for family, settings in families.items():
        tasks = _distinct(family, settings, sum(counts), seed)
        for split, count in zip(splits, counts, strict=True):
            split += itertools.islice(tasks, count)
    return splits


def _distinct(family: str, settings: Mapping[str, Any], count: int, seed: int) -> Iterator[Task]:
    """`count` tasks with different questions; gives up after ten times as many."""
    tries = 10 * count
    try:
        dataset = _gym().create_dataset(family, seed=seed, size=tries, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise TaskError(f"task family {family!r} with {dict(settings)}: {error}") from error
    found = {}
    for number in range(tries):
        task = Task(family, dataset[number])
        found.setdefault(task.question, task)
        if len(found) == count:
            return iter(found.values())
    raise TaskError(
        f"task family {family!r} has only {len(found)} different questions among {tries} with "
        f"{dict(settings)}, {count} are needed: widen its settings, or ask for fewer tasks"
    )


def scores(tasks: Sequence[Task], answers: Sequence[str]) -> list[bool]:
    """Whether each answer is right in full, by the family's own scorer; blanks around it do not
    count."""
    scorer = {t.family: _gym().get_score_answer_fn(t.family) for t in tasks}
    return [
        scorer[task.family](answer.strip(), dict(task.entry)) == 1.0
        for task, answer in zip(tasks, answers, strict=True)
    ]
