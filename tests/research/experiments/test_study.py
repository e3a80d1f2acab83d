"""Test the study of one setting and of budgets: its runs, its choice, and its analysis."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from research.scripts import need

keras = pytest.importorskip("keras")
need("jax", "optax", "mnist1d", "scipy", "sklearn", "tqdm")
if keras.backend.backend() != "jax":
    pytest.skip("the study runs on Keras' JAX backend alone", allow_module_level=True)

from scipy import stats  # noqa: E402

import vsgd.keras  # noqa: E402
from experiments import bench as keras_bench  # noqa: E402
from experiments import records, spread, tasks  # noqa: E402
from experiments.study import analysis, protocol, rates, report, runs  # noqa: E402
from experiments.study.bench import Bench, find_hidden_matrices  # noqa: E402
from experiments.study.entrants import ENTRANTS, Setting  # noqa: E402
from experiments.study.tasks import NEW_TASKS  # noqa: E402

STEPS = 50
SPLITS = ("train", "validation", "test")


def shorten(name: str) -> tasks.Task:
    return dataclasses.replace(tasks.TASKS[name], steps=STEPS)


@pytest.mark.parametrize(
    ("entrant", "schedule", "peer"),
    [
        # Keras multiplies the momentum, instead of the step, by the learning rate, which must then be constant.
        ("sgd", "constant", lambda: keras.optimizers.SGD(0.01, momentum=0.9)),
        ("vsgd", "cosine", lambda: vsgd.keras.VSGD(0.01)),
        ("calibrated", "cosine", lambda: vsgd.keras.ConstantVSGD(0.01, prior_strength="auto", forgetting_floor=0.01)),
    ],
)
def test_a_compiled_step_for_all_settings_trains_as_keras_does(entrant: str, schedule: str, peer: Any) -> None:
    task = shorten("mnist1d-mlp")
    setting = Setting(0.01, schedule, 0.2 if schedule == "cosine" else 0.0, ENTRANTS[entrant].beta1, 0.0)
    found = Bench(task, ENTRANTS[entrant]).run(setting, seed=3)
    expected = keras_bench.Bench(task, peer()).run(3, setting.list_rates(STEPS))
    np.testing.assert_allclose(found.losses, expected.losses, rtol=2e-5)
    np.testing.assert_allclose(found.curve, expected.curve, atol=1e-3)  # two of 2000 examples may be on the edge
    assert found.final is not None
    assert expected.final is not None
    for split, values in expected.final.items():
        assert found.final[split] == pytest.approx(values, rel=1e-4, abs=1e-3)


def test_batch_normalization_and_several_inputs_train_as_in_keras() -> None:
    for name in ("digits-convmixer", "digits-vae"):
        task = shorten(name)
        setting = Setting(0.003, "constant", 0.0, 0.9, 0.0)
        found = Bench(task, ENTRANTS["adam"]).run(setting, seed=1)
        expected = keras_bench.Bench(task, keras.optimizers.Adam(0.003, epsilon=1e-8)).run(1, setting.list_rates(STEPS))
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-3)
        assert found.final is not None
        assert expected.final is not None
        assert found.final["test"]["loss"] == pytest.approx(expected.final["test"]["loss"], rel=5e-3)


def test_every_entrant_lowers_the_risk_and_one_bench_serves_all_settings() -> None:
    task = dataclasses.replace(tasks.TASKS["quadratic"], steps=400)
    for entrant in ENTRANTS.values():
        bench = Bench(task, entrant)
        ends = []
        for rate in (entrant.center, 4 * entrant.center):
            found = bench.run(Setting(rate, entrant.schedules[0], 0.1, entrant.beta1, entrant.weight_decay), seed=0)
            assert found.final is not None
            ends.append(found.final["test"]["loss"])
            assert ends[-1] < 0.9 * found.curve[0]
        assert ends[0] != ends[1]
        assert bench._step._cache_size() == 1  # the settings are traced


def test_a_run_of_no_step_has_the_metrics_of_the_initial_weights() -> None:
    found = Bench(tasks.find_task("quadratic@0"), ENTRANTS["sgd"]).run(Setting(0.0, "constant", 0.0, 0.0, 0.0), seed=5)
    (point,) = (each.astype(np.float64) for each in keras_bench.make_initial_values(tasks.TASKS["quadratic"], 5))
    assert found.final is not None
    assert found.final["test"]["loss"] == pytest.approx(0.5 * np.sum(tasks.CURVATURES * point**2), rel=1e-5)
    assert found.losses == []


def test_a_run_that_diverges_has_no_end_and_keeps_its_looks() -> None:
    found = Bench(shorten("quadratic"), ENTRANTS["sgd"]).run(Setting(1e30, "constant", 0.0, 0.9, 0.0), seed=0)
    assert found.final is None
    assert len(found.curve) == STEPS // 2 + 1
    assert found.curve[-1] is None
    assert found.losses[-1] is None


def test_a_schedule_free_run_is_evaluated_at_its_average() -> None:
    """The gradient is taken between the stepped point z and the average x, here half-way (Defazio et al., 2024)."""
    task = dataclasses.replace(tasks.TASKS["quadratic"], steps=2)
    found = Bench(task, ENTRANTS["schedule-free-adamw"]).run(Setting(0.1, "constant", 0.0, 0.5, 0.0), seed=5)
    (point,) = (each.astype(np.float64) for each in keras_bench.make_initial_values(task, 5))
    noises = itertools.islice(task.load_data().batches(np.random.default_rng(5)), 2)
    second, visited, average = 0.0, point.copy(), point.copy()
    for step, batch in enumerate(noises, 1):
        gradient = tasks.CURVATURES * (visited + average) / 2 + batch.x[0]
        second = 0.999 * second + 0.001 * gradient**2
        visited = visited - 0.1 * gradient / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        average += (visited - average) / step
    assert found.final is not None
    assert found.final["test"]["loss"] == pytest.approx(0.5 * np.sum(tasks.CURVATURES * average**2), rel=1e-4)


def test_muon_steps_the_kernels_of_hidden_layers_as_matrices() -> None:
    def find(name: str) -> list[tuple[str, Any]]:
        model = tasks.find_task(name).make_network()
        chosen = zip(model.trainable_variables, find_hidden_matrices(model), strict=True)
        # Without the numbers that Keras appends to the layers' names.
        return [(re.sub(r"_\d+", "", each.path), axes) for each, axes in chosen if axes]

    dense = ("dense/kernel", ((0,), (1,)))
    projections = [(f"multi_head_attention/{part}/kernel", ((0,), (1, 2))) for part in ("query", "key", "value")]
    attention = [*projections, ("multi_head_attention/attention_output/kernel", ((0, 1), (2,)))]
    assert find("mnist1d-mlp") == 2 * [dense]
    assert find("mnist1d-cnn") == 3 * [("conv1d/kernel", ((0, 1), (2,)))]
    assert find("digits-convmixer") == 3 * [("conv2d/kernel", ((0, 1, 2), (3,)))]
    assert find("characters") == 2 * [*attention, dense, dense]
    assert find("mnist-transformer-b8") == [dense, *attention, dense, dense]
    assert find("shakespeare-lora-b64") == 2 * [(f"dense/lora_kernel_{part}", ((0,), (1,))) for part in "ab"]
    assert find("bible-words-b256") == []


def test_rates_warm_up_and_fall() -> None:
    rates = Setting(2.0, "cosine", 0.25, 0.9, 0.0).list_rates(8)
    falls = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates == pytest.approx([2 * falls[0] * 0.5, *(2 * each for each in falls[1:])])
    assert Setting(2.0, "constant", 0.5, 0.9, 0.0).list_rates(4) == [1.0, 2.0, 2.0, 2.0]


def test_the_choice_sees_neither_the_new_tasks_nor_the_tests_seeds() -> None:
    selection = list(protocol.list_selection_runs())
    tests = [
        run
        for name, entrant in ENTRANTS.items()
        for run in protocol.list_one_setting_runs(name, {each: entrant.list_grid(each)[0] for each in entrant.schedules})
    ]
    budgets = [run for name in ENTRANTS for run in protocol.list_budget_runs(name)]
    sweep = [run for name in ENTRANTS for run in rates.list_rate_runs(name)]
    seeds = [{run.seed for run in part} for part in (selection, tests, budgets, sweep)]
    assert all(first.isdisjoint(second) for first, second in itertools.combinations(seeds, 2))
    assert {run.task.partition("@")[0] for run in (*tests, *budgets)}.isdisjoint(run.task for run in selection)
    assert {run.task for run in budgets} == set(protocol.BUDGET_TASKS) <= set(NEW_TASKS)
    assert len({str(run.key) for run in (*selection, *tests, *budgets)}) == len(selection) + len(tests) + len(budgets)


def test_random_trials_fill_their_spans_and_are_the_same_draws_for_all() -> None:
    draws = {name: [run.setting for run in protocol.list_budget_runs(name)] for name in ENTRANTS}
    for name, entrant in ENTRANTS.items():
        settings = draws[name]
        places = np.log10([each.learning_rate / entrant.center for each in settings])
        low, high = entrant.decay_span
        decays = np.log10([each.weight_decay / low for each in settings])
        forgets = np.array([1 - each.beta1 for each in settings])
        assert high / low == pytest.approx(1000)
        for drawn, ends in ((places, (-1.5, 1.5)), (decays, (0, 3)), (np.log(forgets), np.log((0.02, 0.5)))):
            assert ends[0] - 0.02 <= drawn.min()
            assert drawn.max() <= ends[1] + 0.02
            assert stats.kstest(drawn, stats.uniform(ends[0], ends[1] - ends[0]).cdf).pvalue > 1e-3
        assert min(each.warm_up for each in settings) >= 0
        assert max(each.warm_up for each in settings) <= 0.3
        assert [each.warm_up for each in settings] == [each.warm_up for each in draws["adamw"]]


def test_the_setting_with_the_least_mean_gap_is_chosen() -> None:
    def find(run: protocol.Run) -> dict[str, Any]:
        # Every optimizer's best rate is 2^2 times its center with a warm-up, and 2^-1 times without, which is slightly worse.
        entrant = ENTRANTS[run.entrant]
        goal = 2.0 if run.setting.warm_up else -1.0
        miss = abs(math.log2(run.setting.learning_rate / entrant.center) - goal) + (0 if run.setting.warm_up else 0.1)
        task = tasks.find_task(run.task)
        untrained, end = (0.1, 0.9 - 0.05 * miss) if task.sign < 0 else (10.0, 1 + miss)
        diverged = miss > 5
        return {"curve": [untrained], "final": None if diverged else {"validation": {task.metric: end}}}

    for name, settings in protocol.choose_settings(find).items():
        for schedule, setting in settings.items():
            power, warm_up = (2, 0.2) if 0.2 in ENTRANTS[name].warm_ups else (-1, 0.0)
            assert (setting.schedule, setting.warm_up) == (schedule, warm_up)
            assert setting.learning_rate == pytest.approx(ENTRANTS[name].center * 2**power, rel=0.01)
    with pytest.raises(ValueError, match="is missing, but the analysis needs all runs"):
        protocol.choose_settings(lambda run: None)


def test_a_choice_at_the_edge_of_the_grid_is_followed_by_one_step_beyond() -> None:
    def find(run: protocol.Run) -> dict[str, Any]:
        # Validation metrics fall by a tenth with each factor of two, and rise again beyond 2^3 times the center.
        power = math.log2(run.setting.learning_rate / ENTRANTS[run.entrant].center)
        task = tasks.find_task(run.task)
        end = task.sign * (0.5 - 0.1 * power if power < 3.5 else 0.4)
        return {"curve": [task.sign * 1.0], "final": {"validation": {task.metric: end}}}

    settings = protocol.choose_settings(find)
    beyond = list(protocol.list_edge_runs(settings))
    assert len(beyond) == len(protocol.SELECTION_TASKS) * sum(map(len, settings.values()))
    for run in beyond:
        assert run.setting.learning_rate == pytest.approx(16 * ENTRANTS[run.entrant].center, rel=0.01)
    # From 1 to the best, 0.2, the way is 0.8.
    assert protocol.compute_edge_gap("adamw", beyond[-1].setting, find, find) == pytest.approx(0.2 / 0.8)
    assert protocol.step_beyond_edge("adamw", ENTRANTS["adamw"].list_grid("cosine")[3]) is None


def test_finished_runs_are_kept_and_packed(tmp_path: Path) -> None:
    setting = Setting(0.01, "cosine", 0.0, 0.9, 0.0)
    wanted = [protocol.Run("quadratic", "sgd", setting, seed) for seed in (0, 1)]
    runs.perform_missing(wanted[:1], spread.Store(tmp_path), 1, "test")
    path = tmp_path / "quadratic.jsonl"
    records.pack_records(path)
    assert not path.exists()
    runs.perform_missing(wanted, spread.Store(tmp_path), 1, "test")
    assert len(records.read_jsonl(path)) == 1  # the second; the first is in the packed file
    records.pack_records(path)
    found = [spread.Store(tmp_path).find(each) for each in wanted]
    assert all(each is not None and each["final"]["test"]["loss"] < each["curve"][0] for each in found)
    assert found[0] != found[1]
    with pytest.raises(ValueError, match="workers is 0, but must be at least 1"):
        runs.perform_missing(wanted, spread.Store(tmp_path), 0, "test")


def test_the_expected_best_of_random_subsets_is_the_mean_over_all_of_them() -> None:
    gaps = np.random.default_rng(0).random(7)  # ranked by a validation metric that is independent of the test
    for size, expected in enumerate(analysis.compute_expected_best(gaps, 5), 1):
        best = [gaps[min(subset)] for subset in itertools.combinations(range(7), size)]
        assert expected == pytest.approx(statistics.fmean(best))


def test_gaps_profiles_and_targets() -> None:
    assert [protocol.compute_gap(each, 10.0, 2.0) for each in (2.0, 6.0, 12.0, math.inf)] == [0, 0.5, 1, 1]
    assert analysis.compute_profile([0, 0.1, 0.1, 0.5], [0, 0.1, 0.3, 1]) == [0.25, 0.75, 0.75, 1]

    name = next(name for name in NEW_TASKS if tasks.find_task(name).metric == "loss")
    settings = {each: {way: entrant.list_grid(way)[0] for way in entrant.schedules} for each, entrant in ENTRANTS.items()}

    def find(run: protocol.Run) -> dict[str, Any]:
        ends = {"adamw": 0.0, "sgd": None, "vsgd": -0.1}
        end = ends.get(run.entrant, 0.5)
        if end is None:
            return {"curve": [1.0, None, None], "final": None}
        middle = 0.04 if run.entrant == "vsgd" else end + 0.5
        return {"curve": [1.0, middle, end], "final": {"test": {"loss": end + 0.001 * (run.seed - 404.5)}}}

    untrained = {"final": {"test": {"loss": 1.0}}}
    finds = {"one-setting": find, "untrained": lambda run: untrained if run.task == f"{name}@0" else None}
    results = analysis.Results(analysis.Condition(name, "cosine"), settings, finds)
    assert results.untrained == 1
    assert results.best == pytest.approx(-0.1)
    assert results.compute_mean_gap("adamw") == pytest.approx(0.1 / 1.1)
    assert results.compute_mean_gap("sgd") == 1
    assert results.count_lost("sgd") == 10
    assert results.count_lost("vsgd") == 0
    steps = analysis.count_target_steps(results)
    every = results.task.every / results.task.steps
    # A loss of 0.05 is 95% of AdamW's way from 1 to 0.
    assert (steps["vsgd"], steps["adamw"], steps["muon"]) == (every, 2 * every, math.inf)
    with pytest.raises(ValueError, match="is missing, but the analysis needs all runs"):
        analysis.Results(analysis.Condition(name, "cosine"), settings, finds | {"one-setting": lambda run: None})


def test_the_table_of_rates_has_the_best_ones_and_what_the_others_lose() -> None:
    goals = {"calibrated": 0.008, "constant-vsgd": 0.016, "adamw-warm": 0.004, "adamw": 0.002}

    def find(run: protocol.Run) -> dict[str, Any]:
        task = tasks.find_task(run.task)
        # Each factor of two from the best rate costs a tenth of the way from 1 to 0.1; large batches double the best rate.
        goal = goals[run.entrant] * (2 if run.task.partition("@")[0] in list(NEW_TASKS)[1::2] else 1)
        end = 0.1 + 0.09 * abs(math.log2(run.setting.learning_rate / goal))
        return {"curve": [task.sign * 1.0], "final": {"validation": {task.metric: task.sign * end}}}

    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in rates.format_rates_table(find).splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [f"{batches}, {length}x", way] for batches in ("small", "large") for length in (1, 4) for way in ("cosine", "constant")
    ]
    for row in rows:
        scale = 1 if row[0].startswith("small") else 2
        assert [float(cell.split()[0]) for cell in row[2:6]] == [scale * each for each in goals.values()]
        assert row[6].startswith("4 (4 to 4)")
        lost = [10 * abs(math.log2(rate / (scale * 0.008))) for rate in rates.SHOWN]
        assert [float(cell.split()[0]) for cell in row[7:]] == pytest.approx(lost, abs=0.01)
    with pytest.raises(ValueError, match="is missing, but the analysis needs all runs"):
        rates.format_rates_table(lambda run: None)


def test_the_pages_have_the_gaps_of_known_ends(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ends = dict(zip(ENTRANTS, np.linspace(0.1, 0.6, len(ENTRANTS)), strict=True))

    def find(run: protocol.Run) -> dict[str, Any]:
        task = tasks.find_task(run.task)
        if run.task.endswith("@0"):
            return {"final": {"test": {task.metric: task.sign * 1.0}}}
        # A high accuracy is good. Runs differ by at most 0.001, and the rates of a grid by their distance from the center.
        distance = abs(math.log2(run.setting.learning_rate / ENTRANTS[run.entrant].center)) if run.seed == 300 else 0
        noise = (7 * len(run.task) + 5 * run.seed + 3 * list(ENTRANTS).index(run.entrant)) % 11 - 5
        end = ends[run.entrant] + 0.0002 * noise + 0.01 * distance
        scale = task.sign
        return {"curve": [scale * 1.0, scale * end], "final": {split: {task.metric: scale * end} for split in SPLITS}}

    settings = protocol.choose_settings(find)
    pages = tmp_path / "results.md", tmp_path / "appendix.md"
    finds = dict.fromkeys(("selection", "edges", "untrained", "one-setting", "budget", "rates"), find)
    report.write_pages(finds, settings, *pages, tmp_path)
    results, appendix = (page.read_text(encoding="utf-8") for page in pages)
    # The first entrant is the best, and 0.9 better than the untrained loss of 1.
    titles = [line.split("|")[1].strip() for line in results.splitlines() if re.search(r"\| 0 of \d+ +\|", line)]
    assert titles == [entrant.title for entrant in ENTRANTS.values()]
    difference = 100 * (ends["calibrated"] - ends["adamw"]) / 0.9
    (row,) = (line for line in appendix.splitlines() if re.match(r"\| all tasks +\| AdamW +\|", line))
    # The noise moves each mean by at most 0.001 of 0.9, and so a difference by at most 0.23%.
    assert float(row.split("|")[3].split()[0]) == pytest.approx(difference, abs=0.23)
    table = appendix.partition("<!-- study-comparisons -->")[2].partition("<!-- /study-comparisons -->")[0]
    compared = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if " of 10 " in line]
    others = {subject: [each for each in ENTRANTS if each != subject] for subject in ("calibrated", "constant-vsgd")}
    assert [cells[0] for cells in compared] == [ENTRANTS[each].title for names in others.values() for each in names]
    # The first entrant is better than all others, and the second is worse than the first alone.
    assert [tuple(cells[2:]) for cells in compared] == [
        ("worse", "0 of 10") if place == len(others["calibrated"]) else ("better", "10 of 10") for place in range(len(compared))
    ]
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"forest", "curves"}
