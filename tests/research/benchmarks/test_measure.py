"""Test the benchmarks' statistics and counts, and which results belong together. No time is asserted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from research.scripts import run

from benchmarks import machine, measure, shapes, suite, timing
from reporting.pages import format_table, replace_section


def test_a_paired_ratio_by_hand() -> None:
    # The ratios are 2 / 1, 3 / 2 and 8 / 2; in one round the competitor did not run.
    assert timing.compute_paired_ratio([2.0, 3.0, None, 8.0], [1.0, 2.0, 5.0, 2.0]) == (2.0, 1.75, 3.0)


class Machine:
    """A clock, and steps that advance it; the machine slows down by a factor in every round."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor
        self.now = 0.0
        self.slowness = 1.0
        self.rounds: list[list[tuple[str, int]]] = []

    def step(self, name: str, seconds: float) -> Callable[[int], None]:
        def take(count: int) -> None:
            self.now += count * seconds * self.slowness
            if self.rounds:
                self.rounds[-1].append((name, count))

        return take

    def slow_down(self) -> None:
        self.slowness *= self.factor
        self.rounds.append([])

    def interleave(self, seconds: dict[str, float], **limits: float) -> dict[str, list[float | None]]:
        steps = {name: self.step(name, each) for name, each in seconds.items()}
        return timing.interleave(steps, timing.Limits(**limits), self.slow_down, lambda: self.now)


def test_a_machine_that_grows_slower_leaves_the_ratios_alone() -> None:
    slowing = Machine()
    samples = slowing.interleave({"base": 1.0, "slow": 3.0}, rounds=8, sample_seconds=0.5, competitor_seconds=1e9)
    assert samples["base"] == [2.0**number for number in range(1, 9)]
    assert timing.compute_paired_ratio(samples["slow"], samples["base"]) == (3.0, 3.0, 3.0)
    orders = {tuple(name for name, _ in entries) for entries in slowing.rounds}
    assert orders == {("base", "slow"), ("slow", "base")}


def test_short_steps_are_repeated_and_reported_as_one() -> None:
    slowing = Machine()
    samples = slowing.interleave({"short": 0.25}, rounds=2, sample_seconds=1.0, competitor_seconds=1e9)
    # One step settles, four are measured.
    assert slowing.rounds == [[("short", 1), ("short", 4)]] * 2
    assert samples == {"short": [0.5, 1.0]}


def test_a_slow_competitor_sits_out_after_some_rounds() -> None:
    steady = Machine(factor=1.0)
    samples = steady.interleave({"base": 1.0, "slow": 100.0}, rounds=6, sample_seconds=1.0, competitor_seconds=60.0)
    assert samples == {"base": [1.0] * 6, "slow": [100.0] * 3 + [None] * 3}


# What is counted


def test_shapes() -> None:
    sizes = {shape.name: (len(shape.tensors), shape.parameters) for word in shapes.NAMED for shape in shapes.parse(word)}
    assert sizes == {"conv": (34, 9_414_090), "many": (300, 300 * 64), "large": (4, 4 * 4096**2)}
    assert [len(shape.tensors) for shape in shapes.parse("tensors")] == [1, 3, 10, 30, 100, 300, 1000, 3000]
    for shape in shapes.parse("parameters"):
        assert len(shape.tensors) == 4
        assert shape.parameters == pytest.approx(int(shape.name.partition("=")[2]), rel=0.02)


@pytest.mark.parametrize("word", ["small", "tensors=", "tensors=0", "tensors=x", "conv=3"])
def test_a_shape_that_is_none(word: str) -> None:
    with pytest.raises(ValueError, match=f"^shape is '{word}', but must be one of conv, many, large"):
        shapes.parse(word)


def test_moving_memory_adds_every_element_once() -> None:
    memory = machine.Memory(8000)
    # Two arrays of 1000 float32: one is read, the other is read and written.
    assert memory.moved == 3 * 4000
    for move in (memory._add_by_one_thread, memory._add_by_all_threads):
        before = memory._a.copy()
        move()
        np.testing.assert_array_equal(memory._a, before + 1)


def test_a_competitor_that_lacks_something_sits_out() -> None:
    needs = {"base": {}, "other": {}, "lacking": {"needs": ("no_such_package",)}, "elsewhere": {"devices": ("cuda",)}}
    competitors = {name: suite.Competitor(make=lambda problem: None, **each) for name, each in needs.items()}
    small = suite.Suite("", ("base",), competitors, lambda shape, device: None, (), {}, "")
    assert measure.choose_competitors(small, None, "cpu") == ["base", "other"]
    assert measure.choose_competitors(small, None, "cuda") == ["base", "other", "elsewhere"]
    assert measure.choose_competitors(small, ["lacking", "elsewhere"], "cpu") == ["base"]
    with pytest.raises(ValueError, match=r"^--competitors has none, but must name some of base, other"):
        measure.choose_competitors(small, ["none"], "cpu")


# The results


def test_a_section_that_does_not_end_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "<!-- /torch -->\n\n<!-- torch -->\nold\n\nAfter.\n"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"^section 'torch' of .*page\.md begins with <!-- torch -->, but must end with <"):
        replace_section(page, "torch", ["new"])
    assert page.read_text() == text


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    table = format_table(["name", "x"], [["a", "1.5"], ["long name", "10"]], left=1)
    assert table.splitlines() == ["| name      |   x |", "| --------- | --: |", "| a         | 1.5 |", "| long name |  10 |"]


def test_results_of_another_machine_are_not_mixed() -> None:
    merge = measure.merge_results
    old, same, other = (
        {"environment": {"versions": {"torch": version}}, "competitors": competitors}
        for version, competitors in (("2", {"a": 1, "b": 1}), ("2", {"b": 2, "c": 2}), ("3", {"b": 2, "c": 2}))
    )
    assert merge(None, same) == same
    assert merge(old, same)["competitors"] == {"a": 1, "b": 2, "c": 2}
    assert merge(old, other) == other


def test_the_accuracy_of_compact_state_is_reported(tmp_path: Path) -> None:
    for package in ("torch", "sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    page = tmp_path / "page.md"
    run("-m", "benchmarks.compact", "--seeds", "2", "--epochs", "1", "--page", str(page))
    assert (tmp_path / "page" / "compact-state.svg").stat().st_size > 10_000
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")][2:]
    means = [[float(cell.split("±")[0]) for cell in row.split("|")[2:-1]] for row in rows]
    for wide, compact, difference in zip(*means, strict=True):
        assert compact - wide == pytest.approx(difference, abs=0.06 * wide)  # each has two digits
