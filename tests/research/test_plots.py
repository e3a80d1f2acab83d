"""Test the style of the pages' plots: distinguishable colours on light and dark pages, and equal files for equal plots."""

from __future__ import annotations

from pathlib import Path

import pytest
from research.scripts import ROOT, need

need("matplotlib")

from experiments.quickstart import ENTRANTS  # noqa: E402
from reporting import plots  # noqa: E402

PAGES = ("#ffffff", "#131416")  # the theme's backgrounds, light and dark


def luminance(colour: str) -> float:
    """Return the relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted(luminance(colour) + 0.05 for colour in (one, other))
    return light / dark


def test_text_and_curves_stand_out_on_light_and_dark_pages() -> None:
    assert min(contrast(plots.INK, page) for page in PAGES) > 4
    assert min(contrast(colour, page) for colour in (*plots.OPTIMIZERS.values(), *plots.CYCLE) for page in PAGES) > 3.8
    assert len({*plots.OPTIMIZERS.values()}) == len(plots.OPTIMIZERS)


def test_an_optimizer_has_one_colour_under_all_its_names() -> None:
    for optimizer, names in {
        "VSGD": ("VSGD(fused=True), bfloat16 state", "vsgd", "VSGD, kappas 0.6 and 0.7"),
        "Constant VSGD": ("ConstantVSGD(fused=True)", "constant_vsgd", "Constant VSGD, auto"),
        "Muon": ("Muon with AdamW",),
        "AdamW": ("optax.adamw", "AdamW, warm-up, beta2 0.99"),
        "SGD": ("SGD with momentum", "optax.sgd(momentum=0.9)"),
    }.items():
        assert {plots.find_colour(name) for name in names} == {plots.OPTIMIZERS[optimizer]}
    with pytest.raises(ValueError, match="name is 'SOAP', but must contain one of Muon"):
        plots.find_colour("SOAP")
    styles = plots.style_optimizers(ENTRANTS).values()
    assert len({(style["color"], style["linestyle"]) for style in styles}) == len(ENTRANTS)


@pytest.mark.usefixtures("without_pyplot")
def test_equal_plots_are_equal_files_without_a_background(tmp_path: Path) -> None:
    for name in ("one", "other"):
        with plots.drawing(tmp_path / f"{name}.svg", height=3) as figure:
            figure.subplots().plot([1, 2], label="a curve")
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "other.svg").read_text(encoding="utf-8")
    assert "#ffffff" not in text
    assert plots.INK in text


def test_the_pages_plots_have_no_background_and_are_small() -> None:
    images = sorted((ROOT / "docs").rglob("*.svg"))
    assert len(images) > 10
    for image in images:
        text = image.read_text(encoding="utf-8")
        assert len(text) < 1_000_000, image
        assert "fill: #ffffff" not in text, image
