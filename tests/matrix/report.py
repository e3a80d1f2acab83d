"""The table of what agreed with what, and to how much, as Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from matrix.experiments import DTYPES, EXPERIMENTS, TOLERANCE, is_reference
from matrix.worker import Cell, Outcome

COMMAND = "python -m pytest tests/matrix --agreement docs/agreement.md"
# Column by column, the experiments of which it shows the worst.
_COLUMNS = {
    "golden": [name for name in EXPERIMENTS if name.startswith("golden")],
    "constant fed": ["constant-fed"],
    "posterior": ["posterior", "constant-posterior"],
    "outliers fed": ["outliers-fed"],
    "training": ["training"],
    "constant training": ["constant-training"],
}
_PAGE = """\
# Agreement

Every adapter and engine runs the same update. This is how far each strayed, at most, from what it is held against, in
`tests/matrix`. A run of

```sh
{command}
```

wrote this page, on {machine}, with {versions}.

- **golden**: {golden} trajectories of the authors' code in float64, their gradients fed to VSGD; parameters, `mu_g`, `b_g` and
  `b_ghat` at every step, relative to the largest value that the element takes at any.
- **constant fed**: the gradients of one of them fed to Constant VSGD, which the authors' code lacks; against `vsgd.numpy` in
  float64, measured likewise.
- **posterior**: what `posterior` tells of each gradient after each of these steps, of both optimizers.
- **outliers fed**: the same gradients fed to VSGD with `outlier_threshold=1.5`.
- **training** and **constant training**: 200 steps of a network with 2410 parameters on scikit-learn's digits with VSGD and
  Constant VSGD at their defaults, from the same weights, with the same batches, each framework computing its own gradients;
  parameters at every 20th step against `vsgd.numpy` in float64 with gradients derived by hand, relative to the array's largest
  value.

The first row has the bounds that the tests assert. That of a float32 training is ten times how far two such trainings drift
apart whose initial weights differ by one unit in the last place. Torch's and MLX's compilers run some cells only, for each
takes them seconds. Keras trains a compiled model, but in float64 on JAX and torch, where its operations go through float32, it
gets the backend's own gradients.
{gpu}

{table}
"""


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bound(experiment: str, dtype: str) -> str:
    kind = "training" if EXPERIMENTS[experiment].case is None else "fed"
    return f"{TOLERANCE[kind][dtype]:.0e}"


def _cell(strayed: Mapping[Cell, float], name: str, device: str, experiments: list[str], dtype: str) -> str:
    if any(is_reference(name, experiment, dtype) for experiment in experiments):
        return "reference"
    errors = [strayed[cell] for experiment in experiments if (cell := (name, device, experiment, dtype)) in strayed]
    if not errors:
        return ""
    few = f" ({len(errors)} of {len(experiments)})" if len(errors) < len(experiments) else ""
    return f"{max(errors):.1e}{few}"


def table(strayed: Mapping[Cell, float]) -> str:
    """The worst of each runner, device and group of experiments.

    Args:
        strayed: how far each cell strayed.
    """
    header = ["runner", "device", *(f"{column}, {dtype}" for column in _COLUMNS for dtype in DTYPES)]
    rows = [["bound", "", *(_bound(experiments[0], dtype) for experiments in _COLUMNS.values() for dtype in DTYPES)]]
    for name, device in dict.fromkeys((name, device) for name, device, _, _ in strayed):
        worst = [_cell(strayed, name, device, experiments, dtype) for experiments in _COLUMNS.values() for dtype in DTYPES]
        rows.append([name, device, *worst])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows))
    first, *others = map(_row, padded)
    return "\n".join([first, _row("-" * width for width in widths), *others])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} processors ({model})"


def page(strayed: Mapping[Cell, float], outcomes: Iterable[Outcome]) -> str:
    """The table with what must be known to read it.

    Args:
        strayed: how far each cell strayed.
        outcomes: what the workers left.
    """
    outcomes = list(outcomes)
    versions = {"Python": platform.python_version()}
    for outcome in outcomes:
        versions.update(outcome.versions)
    if any(name == "torch-fused" for name, *_ in strayed):
        versions["numba"] = version("numba")
    gpus = sorted({outcome.gpu for outcome in outcomes if outcome.gpu is not None})
    return _PAGE.format(
        command=COMMAND,
        machine=" and ".join([_processor(), *gpus]),
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        golden=len(_COLUMNS["golden"]),
        gpu="Float32 products on the GPU are of full precision, not TF32." if gpus else "There was no GPU.",
        table=table(strayed),
    )
