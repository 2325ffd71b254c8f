"""Generated tasks: the same each time, disjoint splits, and scores by the family's own rule."""

import pytest

from llada2_jax.evals.tasks import TaskError, make_tasks, scores

WORDS = {"word_sequence_reversal": {"min_words": 3, "max_words": 4}}
SUMS = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


def test_splits_are_disjoint_and_the_same_each_time():
    families = {**WORDS, **SUMS}
    splits = make_tasks(families, (6, 4), seed=3)
    assert splits == make_tasks(families, (6, 4), seed=3)
    assert splits != make_tasks(families, (6, 4), seed=4)
    assert [len(split) for split in splits] == [12, 8]
    for split, count in zip(splits, (6, 4), strict=True):
        assert [task.family for task in split] == [f for f in families for _ in range(count)]
    questions = [task.question for split in splits for task in split]
    assert len(set(questions)) == len(questions)


def test_an_answer_is_right_in_full_or_not_at_all():
    [tasks] = make_tasks(WORDS, (3,), seed=0)
    answers = [f" {tasks[0].answer}\n", f"Well: {tasks[1].answer}", ""]
    assert scores(tasks, answers) == [True, False, False]


@pytest.mark.parametrize(
    ("families", "count", "match"),
    [
        ({"no_such_family": {}}, 1, "no_such_family.*not registered"),
        ({"chain_sum": {"min_terms": 3, "max_terms": 2}}, 1, "chain_sum"),
        ({"chain_sum": {"colour": 1}}, 1, "chain_sum.*colour"),
        (SUMS, 1000, "only .* different questions.*1000 are needed"),
    ],
)
def test_tasks_that_cannot_be_made_say_why(families, count, match):
    with pytest.raises(TaskError, match=match):
        make_tasks(families, (count,), seed=0)
