"""Log gradient posteriors during training: gain, signal-to-noise ratio, noise scale and surprise, every few steps.

A `Monitor` decides when to look, smooths the noise scale, and writes to its sinks. Each adapter looks at its own state:
`vsgd.torch.monitor.watch` before a torch optimizer's step, `vsgd.keras.monitor.MonitorCallback` after Keras' batches, and
`vsgd.optax.monitor.summarize` when you call it. `vsgd.monitor.plots` draws the looks, and
`python -m vsgd.monitor report` makes a page of a CSV file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from vsgd.monitor.files import CsvFile, read_looks
from vsgd.monitor.progress import ProgressLine, get_key_figures
from vsgd.monitor.summaries import SAMPLE, Look, Summary

__all__ = ["SAMPLE", "CsvFile", "Look", "Monitor", "ProgressLine", "Summary", "read_looks"]


class Monitor:
    """Decide when to look, smooth the noise scale over the looks, and write each look to sinks.

    The noise scale is the ratio of two estimates that are noisy step by step. The monitor averages trace and squared norm
    separately, with exponentially falling weights that sum to one from the first look on, as in arXiv 1812.06162, appendix A.1.
    It smooths nothing else, and no noise scale with a standard error, which is an average already.

    To log the loss, assign it: `monitor.loss = loss`. Keras' callback does so itself. To log steps that your training loop
    scaled or skipped, for example by clipping norms, set `monitor.guarded = 0` and add 1 at each such step.

    Args:
        sinks: where to write. An object with `append`, such as a list, a `collections.deque` or a `ProgressLine`, receives each
            `Look`. An object with `add_scalar(tag, value, step)`, such as TensorBoard's `SummaryWriter`, or with
            `log(dict, step=...)`, such as wandb's run, receives `Look.scalars()`. An object with `set_postfix(dict)`, such as a
            bar of tqdm, receives the key figures. A `str` or path names a CSV file, see `CsvFile`.
        every: the number of steps between two looks.
        smoothing: the weight of earlier looks, in [0, 1); 0 smooths nothing.

    Raises:
        ValueError: an argument is out of its range, or a path names a file that a monitor did not write.
        TypeError: a sink has none of these forms.

    Example:
        >>> looks = []
        >>> monitor = Monitor(looks, every=5, smoothing=0.75)
        >>> seen = {
        ...     5: Summary(0.5, 0.1, 1.0, 3.0, noise_trace=8.0, noise_squared_norm=4.0, surprise=1.0),
        ...     10: Summary(0.2, 0.1, 0.9, 2.0, noise_trace=8.0, noise_squared_norm=0.5, surprise=1.1),
        ... }
        >>> for step in range(12):
        ...     if monitor.due(step):
        ...         look = monitor.record(Look(step, overall=seen[step], tensors={}))
        >>> [look.step for look in looks]
        [5, 10]
        >>> [look.overall.gain for look in looks]
        [0.5, 0.2]
        >>> [look.overall.noise_scale for look in looks]
        [2.0, 4.0]
    """

    def __init__(self, *sinks: Any, every: int = 10, smoothing: float = 0.9) -> None:
        if not (isinstance(every, (int, np.integer)) and every >= 1):
            raise ValueError(f"every is {every!r}, but must be an integer >= 1")
        if not (isinstance(smoothing, (int, float, np.floating)) and 0 <= smoothing < 1):
            raise ValueError(f"smoothing is {smoothing!r}, but must be a number in [0, 1)")
        self.every = int(every)
        self.smoothing = float(smoothing)
        self._writers = [_make_writer(sink) for sink in sinks]
        self._means: dict[str | None, tuple[float, float, float]] = {}
        self._loss: Any = None
        self.guarded: int | None = None

    @property
    def loss(self) -> Any:
        """The loss for the next look, a number or an array without dimensions, or None.

        Assign it at each step, before `optimizer.step()`. The monitor keeps the last loss and reads it only at the next
        look, so that other steps do not wait for the device. Then it is None again.

        Raises:
            ValueError: the assigned loss is an array with dimensions.
        """
        return self._loss

    @loss.setter
    def loss(self, loss: Any) -> None:
        shape = tuple(getattr(loss, "shape", ()))
        if shape:
            raise ValueError(f"loss has shape {shape}, but must be a number or of shape ()")
        # Detached, so that it keeps no graph alive.
        self._loss = loss.detach() if hasattr(loss, "detach") else loss

    def due(self, step: int, taken: int = 1) -> bool:
        """Return whether to look now.

        Args:
            step: the number of steps so far.
            taken: the number of steps since the last call.
        """
        return step // self.every != (step - taken) // self.every and step > 0

    def record(self, look: Look) -> Look:
        """Smooth the noise scale of a look, add the loss and the guarded steps, and write the look.

        Args:
            look: an adapter's look.

        Returns:
            The look as it was written.
        """
        tensors = {name: self._smooth(name, summary) for name, summary in look.tensors.items()}
        loss, self._loss = look.loss if self._loss is None else float(self._loss), None
        overall = self._smooth(None, look.overall)
        if self.guarded is not None:
            overall, self.guarded = overall._replace(guarded=self.guarded), 0
        look = Look(look.step, overall, tensors, loss)
        for write in self._writers:
            write(look)
        return look

    def _smooth(self, name: str | None, summary: Summary) -> Summary:
        if summary.noise_scale_error is not None:
            return summary
        old, new = self.smoothing, 1 - self.smoothing
        weight, trace, norm = self._means.get(name, (0.0, 0.0, 0.0))
        weight = old * weight + new
        trace = old * trace + new * summary.noise_trace
        norm = old * norm + new * summary.noise_squared_norm
        self._means[name] = (weight, trace, norm)
        return summary._replace(noise_trace=trace / weight, noise_squared_norm=norm / weight)


def _make_writer(sink: Any) -> Callable[[Look], Any]:
    if isinstance(sink, (str, os.PathLike)):
        return CsvFile(sink).append
    if hasattr(sink, "append"):
        return sink.append
    if hasattr(sink, "add_scalar"):
        return lambda look: [sink.add_scalar(tag, value, look.step) for tag, value in look.scalars().items()]
    # The `log` of Python's loggers takes a level first.
    if hasattr(sink, "log") and not isinstance(sink, (logging.Logger, logging.LoggerAdapter)):
        return lambda look: sink.log(look.scalars(), step=look.step)
    if hasattr(sink, "set_postfix"):
        return lambda look: sink.set_postfix(get_key_figures(look))
    allowed = "a path or have one of append(look), add_scalar(tag, value, step), log(dict, step=...), set_postfix(dict)"
    raise TypeError(f"a sink is {type(sink).__name__}, but must be {allowed}")
