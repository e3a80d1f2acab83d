"""The tables of our comparison, of records that are made up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

for package in ("matplotlib", "scipy", "tqdm"):
    pytest.importorskip(package)

from research.made_up_runs import Surface, distance, diverged, middle, record  # noqa: E402

from experiments import figures, report, spread, tasks  # noqa: E402
from experiments.__main__ import main  # noqa: E402
from experiments.comparison import ARMS, ENTRANTS, TEST_SEEDS, Comparison, Setting  # noqa: E402
from experiments.statistics import Difference  # noqa: E402

LOSS, ACCURACY = "digits-vae", "mnist1d-cnn"
# What each one's train loss and test accuracy are beside AdamW's, in hundredths.
AHEAD = {"vsgd": (-3, 2), "vsgd-kappas": (0, 0), "constant-vsgd": (5, -4), "adamw": (0, 0), "adamw-warm": (-1, 0)}
AHEAD |= {"sgd": (4, 3), "lion": (0, -6)}


def noise(setting: Setting) -> float:
    """Some of each seed, which pairs share, and a little of each entrant, of both signs."""
    own = (-1) ** (setting.seed + list(ENTRANTS).index(setting.entrant)) * 1e-3 if setting.entrant != "adamw" else 0.0
    return 0.02 * (setting.seed % 7) + own


def run(setting: Setting) -> dict[str, Any]:
    train, test = (each / 100 for each in AHEAD[setting.entrant])
    best = 0.8 + test - 0.1 * distance(setting, 1.05 * middle(setting.entrant))
    ends = {"train": 0.3 + train + noise(setting), "test": 0.7 + test + noise(setting)}
    return record(setting.task, best if setting.task == ACCURACY else 1 - best, **ends)


def on(name: str, make: Any = run) -> Comparison:
    return Comparison(tasks.TASKS[name], Surface(make))


def rows_of(table: str) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def section(text: str, name: str) -> str:
    return text.partition(f"<!-- {name} -->\n\n")[2].partition(f"\n\n<!-- /{name} -->")[0]


def task_rows(comparison: Comparison) -> dict[tuple[str, str], list[str]]:
    _, *rows = rows_of(report.format_task_table(comparison))
    return {(arm, optimizer): cells for arm, optimizer, *cells in rows}


def test_without_runs_every_cell_says_so() -> None:
    nothing = on(LOSS, lambda setting: None)
    rows = task_rows(nothing)
    assert len(rows) == len(ARMS) * len(ENTRANTS)
    assert {cell for cells in rows.values() for cell in cells} == {report.MISSING}
    for arm in ARMS:
        _, row, totals = rows_of(report.format_summary(arm, [nothing]))
        assert set(row[1:]) == {report.MISSING}
        assert set(totals[1:]) == {"0-0-0 / 0-0-0"}
    assert set(rows_of(report.format_sensitivity([nothing]))[1][1:]) == {report.MISSING}


def test_losing_rows_stay_in_and_nothing_is_better_that_may_be_chance() -> None:
    rows = task_rows(on(ACCURACY))
    for arm in ARMS:
        for name, entrant in ENTRANTS.items():
            *_, train, than_train, test, than_test = rows[arm, entrant.title]
            ahead, gain = AHEAD[name]
            seeds = sum(0.02 * (seed % 7) for seed in TEST_SEEDS) / 10
            assert float(train) == pytest.approx(0.3 + ahead / 100 + seeds, abs=1e-4)
            assert float(test) == pytest.approx(70 + gain + 100 * seeds, abs=1e-2)
            if name == "adamw":
                assert than_train == than_test == ""
                continue
            # Ten differences of 0.001 and of both signs beside the shift.
            assert than_train.startswith(f"{ahead / 100:+.3g} (" if ahead else "")
            word = {-1: ("better", "worse"), 0: ("level", "level"), 1: ("worse", "better")}
            assert than_train.endswith(word[(ahead > 0) - (ahead < 0)][0])
            assert than_test.endswith(word[(gain > 0) - (gain < 0)][1])


def test_the_summary_counts_vsgd_beside_each_other_one() -> None:
    header, digits, vae, totals = rows_of(report.format_summary("20 trials", [on(ACCURACY), on(LOSS)]))
    found = {name: cells for name, *cells in zip(header, digits, vae, totals, strict=True)}
    assert len(found) == len(ENTRANTS)
    # Train loss, then the test metric: more accuracy is better, more loss is worse.
    assert found["to SGD with momentum"] == ["better / worse", "better / better", "2-0-0 / 1-0-1"]
    assert found["to AdamW"] == ["better / better", "better / worse", "2-0-0 / 1-0-1"]
    assert found["to Lion"] == ["better / better", "better / worse", "2-0-0 / 1-0-1"]


@pytest.mark.parametrize(
    ("difference", "metric", "word"),
    [
        (Difference(-1.0, -2.0, -0.5), "loss", "better"),
        (Difference(-1.0, -2.0, -0.5), "accuracy", "worse"),
        (Difference(1.0, 0.5, 2.0), "loss", "worse"),
        (Difference(1.0, 0.5, 2.0), "accuracy", "better"),
        (Difference(1.0, -0.1, 2.0), "accuracy", "level"),
        (Difference(1.0, 0.0, 2.0), "accuracy", "level"),
    ],
)
def test_verdicts(difference: Difference, metric: str, word: str) -> None:
    assert report.judge_difference(difference, metric) == word


def test_plots_show_where_everyone_ends_losing_ones_too() -> None:
    import matplotlib.pyplot as plt

    found = on(LOSS, lambda setting: record(LOSS, 9.0) if setting.entrant == "sgd" else run(setting))
    figure, axes = plt.subplots()
    assert figures._draw_task_curves(axes, found)
    ends = [line.get_ydata()[-1] for line in axes.get_lines()]
    plt.close(figure)
    # Everyone's line, and the target's.
    assert len(ends) == len(ENTRANTS) + 1
    low, high = axes.get_ylim()
    assert low < min(ends) < 1 < max(ends) == 9.0 < high


def test_steps_are_to_the_target_and_runs_that_never_arrive_count() -> None:
    # AdamW's way is from 0 to 0.8 less a bit; on a straight line to 0.9, 98% of it is at some 22 of 25 looks.
    def quick(setting: Setting) -> dict[str, Any]:
        if setting.entrant != "vsgd":
            return run(setting)
        late = setting.seed in TEST_SEEDS[:4]
        return record(setting.task, 0.5 if late else 0.9)

    comparison = on(ACCURACY, quick)
    target = comparison.compute_target()
    # The best of ten rates is a tenth of 0.145 decades off: 0.8 - 0.0145.
    assert target == pytest.approx(0.98 * 0.7855, abs=1e-3)
    rows = task_rows(comparison)
    assert rows["20 trials", "VSGD"][1:3] == [f"{22 * 80}", "6 of 10"]
    assert rows["20 trials", "Lion"][1:3] == ["not reached", "0 of 10"]
    assert f"target: validation accuracy {100 * target:.4g}%." in report.format_task_section(comparison)


def test_runs_that_diverge_are_told_and_not_averaged() -> None:
    bad = TEST_SEEDS[2:5]
    rows = task_rows(
        on(LOSS, lambda setting: diverged() if setting.entrant == "lion" and setting.seed in bad else run(setting))
    )
    _, _, reached, *ends = rows["defaults", "Lion"]
    assert set(ends) == {"3 of 10 diverged"}
    assert reached != "10 of 10"
    rows = task_rows(
        on(LOSS, lambda setting: diverged() if setting.entrant == "adamw" and setting.seed in bad else run(setting))
    )
    assert rows["defaults", "Lion"][4] == rows["defaults", "Lion"][6] == "of the other 3 of 10 diverged"


def test_a_choice_at_the_edge_is_marked() -> None:
    def steep(setting: Setting) -> dict[str, Any]:
        return record(setting.task, 1 / (1 + setting.trial.learning_rate))

    rows = task_rows(on(LOSS, steep))
    assert rows["20 trials", "VSGD"][0] == "0.3 (edge), constant"
    assert rows["defaults", "VSGD"][0] == "0.01, constant"
    (cell,) = {row[1] for row in rows_of(report.format_sensitivity([on(LOSS, steep)]))[1:]}
    # Within 1% of 1 / 1.3, from a line between 0.139 and 0.3 in the logarithm.
    assert re.fullmatch(r"at least 1\.\dx \(0\.2\d to 0\.3\)", cell)


def test_widths_are_those_of_the_surface() -> None:
    # A third of a decade apart, the two best rates are 0.145 and 0.188 decades from the best one, where accuracy falls by 0.1 a
    # decade from 0.8. So 1% of the best, 0.0079, leads over the second one, and 0.079 and 0.035 decades further.
    _, row = rows_of(report.format_sensitivity([on(ACCURACY)]))
    assert row[1 + list(ENTRANTS).index("adamw")].startswith(f"{10 ** (1 / 3 + 0.079 + 0.035):.1f}x (")


@pytest.mark.usefixtures("without_pyplot")
def test_the_page_has_all_sections_and_is_the_same_when_written_again(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "results.md"
    page.write_text("# Results\n\nBefore.\n\n<!-- small-summary -->\n<!-- /small-summary -->\n\nAfter.\n")
    store = spread.Store(results / spread.FOLDER)
    environment = {"processors": 2, "cpu": "a CPU", "versions": {"python": "3"}}
    for entrant in ("vsgd", "adamw"):
        for setting in Comparison(tasks.TASKS[LOSS], lambda setting: None).list_test_settings(entrant):
            store.add(setting, run(setting), environment)
    main(["report", "--results", str(results), "--page", str(page)])
    text = page.read_text()
    assert text.index("Before.") < text.index("better-level-worse") < text.index("After.") < text.index("<!-- small-tables -->")
    assert re.search(r"\| digits, VAE +\| 0 of 420 +\| 20 of 70", text)
    assert "Run on 2 processors (a CPU), one thread a run; python 3." in text
    assert re.search(r"\| defaults +\| VSGD +\| 0.01, constant +\| not run yet", text)  # the target's cell
    assert "<!-- paper -->" in text
    for image in ("small-curves", "small-learning-rates"):
        assert f"(results/{image}.png)" in text
        assert (results / f"{image}.png").stat().st_size > 10_000
    main(["report", "--results", str(results), "--page", str(page)])
    assert page.read_text() == text


def test_longer_tasks_stand_apart_and_tell_of_those_who_ran_one(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "results.md"
    store = spread.Store(results / spread.FOLDER)
    for name, entrants in ((f"{LOSS}@4", ("vsgd", "adamw")), (f"{ACCURACY}@4", ("lion",))):
        for entrant in entrants:
            for setting in Comparison(tasks.find_task(name), lambda setting: None).list_test_settings(entrant):
                store.add(setting, run(setting), {"processors": 2, "cpu": "a CPU", "versions": {}})
    main(["report", "--results", str(results), "--page", str(page)])
    text = page.read_text()
    assert re.search(r"\| digits, VAE +\| 0 of 420 +\| 0 of 70", text)
    assert re.search(r"\| digits, VAE, 4 times as long +\| 0 of 180 +\| 20 of 30", text)
    small, longer = (rows_of(section(text, f"{group}-summary")) for group in ("small", "longer"))
    assert small[0][1:] == [f"to {entrant.title}" for name, entrant in ENTRANTS.items() if name != "vsgd"]
    assert small[-1][1:] == ["0-0-0 / 0-0-0"] * 6
    # In the order of the tasks, with AdamW worse in train loss and better in the test's.
    assert longer[:4] == [
        ["VSGD, defaults", "to AdamW", "to Lion"],
        ["MNIST-1D, CNN, 4 times as long", report.MISSING, report.MISSING],
        ["digits, VAE, 4 times as long", "better / worse", report.MISSING],
        ["better-level-worse", "1-0-0 / 0-0-1", "0-0-0 / 0-0-0"],
    ]
    assert "4 times as long" not in section(text, "small-tables")
    assert (results / "longer-curves.png").stat().st_size > 10_000


def test_the_list_names_tasks_and_entrants(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    words = capsys.readouterr().out.split()
    assert {*tasks.TASKS, *ENTRANTS} <= set(words)


def test_the_command_line_says_what_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--tasks", "cifar", "--results", str(tmp_path)])
    assert "error: task is 'cifar', but must be one of quadratic, " in capsys.readouterr().err
