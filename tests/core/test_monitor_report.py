"""Test the monitor's output: the loss, CSV files that are read back, the page made from a file, and the progress line."""

from __future__ import annotations

import csv
import html.parser
import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsgd.monitor import CsvFile, Look, Monitor, ProgressLine, Summary, plots, read_looks
from vsgd.monitor.__main__ import main
from vsgd.monitor.report import make_report

NAMES = ("model/dense", "<b>&amp;</b>, \"'", "x" * 60)


def make_looks(count: int = 5, guarded: float | None = None, error: float | None = None) -> list[Look]:
    """Return looks like those of a training, with float64's digits."""
    rng = np.random.default_rng(0)

    def summarize() -> Summary:
        gain, low, median, high, trace, surprise = rng.random(6).tolist()
        return Summary(gain, low, median, high, trace, 0.1, surprise, error, guarded)

    return [Look(10 * k, summarize(), {name: summarize() for name in NAMES}, 1 / k) for k in range(1, count + 1)]


def write(path: Path, looks: list[Look]) -> Path:
    file = CsvFile(path)
    for look in looks:
        file.append(look)
    return path


def assert_equal(read: list[Look], looks: list[Look]) -> None:
    assert [look.step for look in read] == [look.step for look in looks]
    for one, other in zip(read, looks, strict=True):
        assert one.scalars() == pytest.approx(other.scalars(), rel=1e-8)


# The loss.


class Loss:
    """A loss on a device, which counts how often it is read."""

    shape = ()

    def __init__(self) -> None:
        self.reads = 0

    def __float__(self) -> float:
        self.reads += 1
        return 0.5


def test_a_look_has_the_last_loss_once_and_no_other_step_reads_it() -> None:
    looks: list[Look] = []
    monitor, unread, read = Monitor(looks), Loss(), Loss()
    monitor.loss = unread
    monitor.loss = read
    assert (unread.reads, read.reads) == (0, 0)
    for look in make_looks(2):
        monitor.record(look._replace(loss=None))
    assert (unread.reads, read.reads) == (0, 1)
    assert [look.loss for look in looks] == [0.5, None]
    assert looks[0].scalars()["loss/overall"] == 0.5
    assert "loss/overall" not in looks[1].scalars()
    with pytest.raises(ValueError, match=r"loss has shape \(3,\), but must be a number or of shape \(\)"):
        monitor.loss = np.ones(3)


# Files.


@pytest.mark.parametrize("options", [{}, {"guarded": 2.0, "error": 0.25}], ids=["plain", "with all columns"])
def test_a_file_is_read_as_it_was_written(tmp_path: Path, options: dict[str, Any]) -> None:
    looks = make_looks(**options)
    looks[1] = looks[1]._replace(loss=None, overall=looks[1].overall._replace(surprise=None, noise_squared_norm=0.0))
    assert_equal(read_looks(write(tmp_path / "gradients.csv", looks)), looks)


def drop(path: Path, *columns: str) -> None:
    """Remove columns, as in a file of an earlier version."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    keep = [index for index, name in enumerate(header) if name not in columns]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([row[index] for index in keep] for row in [header, *rows])


def test_a_file_without_the_later_columns_and_with_others_is_read_and_continued(tmp_path: Path) -> None:
    looks = make_looks(2)
    path = write(tmp_path / "gradients.csv", looks[:1])
    drop(path, "loss", "guarded", "noise_scale_error")
    path.write_text("".join(f"mine,{line}\n" for line in path.read_text().splitlines()))
    write(path, looks[1:])
    assert path.read_text().splitlines()[-1].startswith(",20,")
    assert_equal(read_looks(path), [look._replace(loss=None) for look in looks])


def test_a_killed_run_is_read_without_its_last_line_and_a_resumed_one_replaces_what_it_repeats(tmp_path: Path) -> None:
    looks = make_looks()
    path = write(tmp_path / "gradients.csv", looks[:4])
    text = path.read_text()
    path.write_text(text[:-3])
    cut = looks[3]._replace(tensors={name: looks[3].tensors[name] for name in NAMES[:-1]})
    assert_equal(read_looks(path), [*looks[:3], cut])
    # Resume from the checkpoint of step 25, so the looks are not at multiples of 10.
    resumed = [look._replace(step=look.step - 2) for look in looks[2:]]
    write(path, resumed)
    assert_equal(read_looks(path), [*looks[:2], *resumed])
    path.write_text(text[:20])
    write(path, looks)
    assert_equal(read_looks(path), looks)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("step,tensor,gain", "step,layer,gains", "line 1: the columns tensor, gain are missing, but"),
        ("10,w,0.5", "10,w,half", r"line 3, column gain: 'half' is not a number, but must be one$"),
        ("10,w,0.5", "10.5,w,0.5", r"line 3, column step: '10.5' is not an integer, but must be one$"),
        ("10,w,0.5", "20,w,0.5", "line 3, column tensor: 'w' begins step 20, but 'overall' must begin it"),
        ("10,w,0.5", "10,0.5", "line 3: the number of cells is 13, but must be 14"),
        ("10,w,0.5", "\xff", "is not text in UTF-8, but must be a CSV file that a monitor wrote"),
        (",0.75\n", ",low\n", "line 2, column loss: 'low' is not a number, but must be one or empty"),
    ],
)
def test_a_damaged_file_is_refused_by_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    summary = Summary(0.5, 1.0, 2.0, 3.0, 8.0, 4.0, 1.5)
    path = write(tmp_path / "gradients.csv", [Look(10, summary, {"w": summary}, 0.75)])
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="latin-1")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}(, | ){message}"):
        read_looks(path)


def test_other_files_are_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for text in ("no line", "a,b\n1,2\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"notes.txt, line 1: the columns step, tensor, gain, .* are missing"):
            Monitor(path)
        assert path.read_text() == text


# The page.


class Page(html.parser.HTMLParser):
    """The elements of a page, the texts of headings and cells, and all identifiers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("h1", "h2", "th", "td", "figcaption"):
            self.texts.append(data)


def test_a_page_has_a_figure_for_each_quantity_that_the_file_has(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    titles = ["Loss", "Noise scale", "Surprise", "Gain by tensor", "Signal to noise by tensor"]
    path = write(tmp_path / "gradients.csv", make_looks(guarded=1.0, error=0.1))
    page = Page(make_report(read_looks(path), title="<i>", batch_size=64))
    assert [text for text in page.texts if text in titles] == titles
    assert page.tags.count("figcaption") == page.tags.count("svg") == 5
    assert {"<i>", *NAMES, "Guarded steps", "5"} <= set(page.texts)
    assert not [text for text in page.texts if "only a trend" in text]
    assert not {"i", "b", "img", "script", "link"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    # Check a file without these columns.
    drop(path, "loss", "surprise", "guarded", "noise_scale_error")
    looks = read_looks(path)
    assert "(without a standard error the noise scale is only a trend)" in make_report(looks)
    hidden = [look._replace(overall=look.overall._replace(noise_squared_norm=-1.0)) for look in looks]
    page = Page(make_report(hidden))
    assert [text for text in page.texts if text in titles] == titles[3:]
    assert not [text for text in page.texts if "uarded" in text or "Loss" in text]
    assert "none: noise hides the gradient" in page.texts


def test_a_page_refers_to_nothing_outside_and_is_the_same_each_time() -> None:
    pytest.importorskip("matplotlib")
    page = make_report(make_looks(), batch_size=64)
    assert page == make_report(make_looks(), batch_size=64)
    links = re.findall(r"""(?:\bsrc=|href=|url\(|@import)["']?([^"')]*)""", page)
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "//" not in re.sub(r'xmlns(:xlink)?="http[^"]*"|base64,[^"]*"', "", page)
    assert "#00abc" not in page  # all colours are the page's


def test_a_page_is_made_of_a_run_that_diverged_or_has_just_begun() -> None:
    pytest.importorskip("matplotlib")
    (look,) = make_looks(1)
    nan, inf = float("nan"), float("inf")
    lost = Look(20, Summary(nan, nan, inf, inf, inf, nan, inf), {NAMES[0]: Summary(nan, nan, inf, inf, inf, nan, nan)}, nan)
    assert Page(make_report([look])).tags.count("figure") == 5
    assert Page(make_report([look, lost])).tags.count("figure") == 5
    page = Page(make_report([lost]))
    assert page.tags.count("figure") == 0
    assert {"nan", "none: noise hides the gradient"} <= set(page.texts)


def test_the_drawings_show_the_loss_the_band_and_the_guarded_steps() -> None:
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots(1, 3)
    looks = make_looks(3, guarded=0.0, error=0.01)
    looks[1] = looks[1]._replace(loss=float("nan"), overall=looks[1].overall._replace(guarded=2.0))
    plots.draw_loss(axes[0], looks)
    np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), [1, np.nan, 1 / 3])
    plots.draw_noise_scale(axes[1], looks)
    band = axes[1].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(max(look.overall.noise_scale for look in looks) + 0.01)
    plots.draw_surprise(axes[2], looks)
    assert axes[2].lines[0].get_ydata().tolist() == [look.overall.surprise for look in looks]
    assert axes[2].lines[2].get_xdata().tolist() == [20]
    assert axes[2].get_legend().get_texts()[2].get_text() == "looks with guarded steps, 2 steps"
    for draw, quantity in ((plots.draw_loss, "loss"), (plots.draw_surprise, "surprise")):
        bare = [look._replace(loss=None, overall=look.overall._replace(surprise=None)) for look in looks]
        with pytest.raises(ValueError, match=f"looks contain no {quantity}, but"):
            draw(axes[0], bare)


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, page = write(tmp_path / "gradients.csv", make_looks()), tmp_path / "page.html"
    main(["report", str(path), "--output", str(page), "--batch-size", "64", "--title", "A run"])
    assert page.read_text(encoding="utf-8") == make_report(read_looks(path), title="A run", batch_size=64)
    assert capsys.readouterr().out == f"{page}: 5 looks of {path}\n"


def test_the_command_refuses_by_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, empty = write(tmp_path / "gradients.csv", make_looks()), tmp_path / "empty.csv"
    text = path.read_text()
    empty.write_text(text[: text.index("\n") + 1])
    for words, message in (
        ([str(tmp_path / "absent.csv")], "absent.csv is not a file, but must be a CSV file that a monitor wrote"),
        ([str(empty)], "empty.csv contains no looks, but must contain at least one"),
        ([str(path), "--batch-size", "0"], r"Invalid batch_size value: 0.0 \(batch_size must be a finite number > 0\)"),
        ([str(path), "--output", str(path)], r"--output is .*, but must be another file than the CSV file"),
        ([str(path), "--output", str(tmp_path / "absent" / "page.html")], "No such file or directory: .*page.html"),
    ):
        with pytest.raises(SystemExit, match=rf"^python -m vsgd.monitor: .*{message}"):
            main(["report", *words])
    assert path.read_text() == text


def test_without_matplotlib_the_command_names_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "gradients.csv", make_looks())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"^python -m vsgd\.monitor: a report needs matplotlib: run pip install matplotlib$"):
        main(["report", str(path)])


# The progress line.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_and_a_file_one_for_each_look() -> None:
    overall = Summary(0.0312, 1.0, 2.0, 3.0, 820.0, 2.0, 1.02)
    looks = [Look(120, overall, {}, 0.2345), Look(130, overall._replace(noise_squared_norm=-1.0, surprise=None), {})]
    first, second = "step 120  loss 0.234  gain 0.0312  noise scale 410/64  surprise 1.02", "step 130  gain 0.0312"
    for stream, written in (
        (io.StringIO(), f"{first}\n{second}\n"),
        (Terminal(), f"\r{first}\r{second.ljust(len(first))}\n"),
    ):
        line = ProgressLine(batch_size=64, stream=stream)
        monitor = Monitor(line, smoothing=0)
        for look in looks:
            monitor.record(look)
        line.close()
        line.close()
        assert stream.getvalue() == written
    with pytest.raises(ValueError, match="batch_size must be"):
        ProgressLine(batch_size=0)


def test_no_line_is_as_wide_as_80_columns() -> None:
    stream = io.StringIO()
    line = ProgressLine(batch_size=123456, stream=stream)
    line.append(Look(123456789, Summary(1.234e-5, 0.0, 0.0, 0.0, 1.2345e-9, 1e-4, 1.234e-7), {}, 1.234e-5))
    line.append(Look(1, Summary(0.5, 0.0, 0.0, 0.0, 999_999.6, 1.0, 1000.4), {}, -1234567.0))
    assert all(60 < len(each) < 80 for each in stream.getvalue().splitlines())
    assert stream.getvalue().endswith("step 1  loss -1.23e+06  gain 0.5  noise scale 1e+06/123456  surprise 1000\n")


def test_a_bar_gets_the_key_figures() -> None:
    tqdm = pytest.importorskip("tqdm")
    stream = io.StringIO()
    with tqdm.tqdm(total=1, file=stream) as bar:
        Monitor(bar).record(Look(1, Summary(0.5, 0.0, 0.0, 0.0, 8.0, 2.0, None), {}, 0.25))
    assert "loss=0.25, gain=0.5, noise scale=4" in stream.getvalue()


def test_guarded_steps_are_counted_from_look_to_look() -> None:
    looks: list[Look] = []
    monitor = Monitor(looks, every=1)
    plain = make_looks(4)
    monitor.record(plain[0])
    monitor.guarded = 0
    for each, steps in zip(plain[1:], (2, 0, 1), strict=True):
        monitor.guarded += steps
        monitor.record(each)
    assert [look.overall.guarded for look in looks] == [None, 2, 0, 1]
