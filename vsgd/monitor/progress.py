"""The key figures of a look on one line, for a terminal and for tqdm."""

from __future__ import annotations

import math
import sys
from typing import TextIO

from vsgd.monitor.summaries import Look
from vsgd.validation import validate_numbers

_WIDTH = 79


class ProgressLine:
    """Write the key figures of each look: step, loss, median gain, noise scale and surprise, in fewer than 80 columns.

    What a look does not contain is left out, and so is a noise scale where noise hides the gradient. In a terminal each look
    overwrites the one before. Elsewhere, as in a log file, each look is a line. With tqdm, use the bar itself as a sink.

    Args:
        batch_size: the batch size, written behind the noise scale; None writes none.
        stream: where to write; None is the standard error.

    Raises:
        ValueError: `batch_size` is out of its range.

    Example:
        >>> from vsgd.monitor import Summary
        >>> line = ProgressLine(batch_size=64, stream=sys.stdout)
        >>> line.append(Look(120, Summary(0.0312, 1.0, 2.0, 3.0, 820.0, 2.0, 1.02), {}, loss=0.2345))
        step 120  loss 0.234  gain 0.0312  noise scale 410/64  surprise 1.02
    """

    def __init__(self, *, batch_size: float | None = None, stream: TextIO | None = None) -> None:
        if batch_size is not None:
            validate_numbers(batch_size=batch_size)
        self._batch_size = batch_size
        self._stream = sys.stderr if stream is None else stream
        self._length = 0

    def append(self, look: Look) -> None:
        """Write the key figures of a look.

        Args:
            look: the look to write.
        """
        figures = get_key_figures(look, self._batch_size)
        line = "  ".join([f"step {look.step}", *(f"{name} {figure}" for name, figure in figures.items())])[:_WIDTH]
        if self._stream.isatty():
            self._stream.write("\r" + line.ljust(self._length))
            self._length = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line in a terminal, so that what is printed next starts a new one."""
        if self._length:
            self._stream.write("\n")
            self._stream.flush()
            self._length = 0


def get_key_figures(look: Look, batch_size: float | None = None) -> dict[str, str]:
    """Return the available key figures by name, as short texts.

    Args:
        look: a look.
        batch_size: the batch size, written behind the noise scale; None writes none.
    """
    overall = look.overall
    found = 0 < overall.noise_scale < math.inf
    numbers = {
        "loss": look.loss,
        "gain": overall.gain,
        "noise scale": overall.noise_scale if found else None,
        "surprise": overall.surprise,
    }
    figures = {name: format_number(number) for name, number in numbers.items() if number is not None}
    if found and batch_size is not None:
        figures["noise scale"] += f"/{format_number(batch_size)}"
    return figures


def format_number(value: float) -> str:
    """Return a number with three digits, or all before the point below a million."""
    return f"{value:.0f}" if 1000 <= abs(value) < 999_999.5 else f"{value:.3g}"
