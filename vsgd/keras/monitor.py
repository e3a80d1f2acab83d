"""Watch a Keras training: see `vsgd.monitor`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from vsgd.keras.observer import GradientObserver
from vsgd.keras.optimizer import RuleOptimizer
from vsgd.keras.posterior import get_real_states
from vsgd.monitor import Monitor
from vsgd.monitor.summaries import (
    Block,
    MonitorOps,
    describe_observed,
    describe_state,
    make_block,
    summarize,
)
from vsgd.observer import State
from vsgd.validation import validate_numbers

__all__ = ["MonitorCallback", "tensorboard_writer"]

_OPS = MonitorOps(
    ops.sum,
    lambda table, sizes: ops.split(table, np.cumsum(sizes)[:-1].tolist(), axis=1),
    ops.stack,
    ops.concatenate,
    ops.take,
    ops.convert_to_numpy,
)


class MonitorCallback(keras.callbacks.Callback):
    """Report the state of the model's optimizer, VSGD or a `GradientObserver`, to a monitor every `monitor.every` batches.

    A callback receives no gradients, so its looks contain no surprise; in your own training loop, call
    `optimizer.surprise(grads)`. Their loss is Keras' own, the mean since the epoch began. With `steps_per_execution` the
    callback looks after the execution in which a look is due. It counts batches, also where gradients are accumulated, and
    continues the optimizer's count, so that a second `fit` or a loaded model goes on counting.

    Args:
        monitor: decides when to look, and writes the looks.
        batch_size: the number of examples that a gradient averages, on all devices and over accumulated steps; with 1 the noise
            scale counts batches.

    Raises:
        ValueError: `batch_size` is out of its range.

    Example:
        >>> import numpy as np
        >>> from vsgd.keras import VSGD
        >>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1, name="linear")])
        >>> model.compile(optimizer=VSGD(), loss="mse")
        >>> looks = []
        >>> watching = MonitorCallback(Monitor(looks, every=2), batch_size=8)
        >>> _ = model.fit(np.ones((32, 3)), np.ones((32, 1)), batch_size=8, callbacks=[watching], verbose=0)
        >>> [look.step for look in looks]
        [2, 4]
    """

    def __init__(self, monitor: Monitor, *, batch_size: float = 1) -> None:
        validate_numbers(batch_size=batch_size)
        super().__init__()
        self.monitor = monitor
        self.batch_size = batch_size
        self._step = 0
        self._last_batch = -1

    def on_train_begin(self, logs: Any = None) -> None:
        """Check the model's optimizer, and continue its count.

        Args:
            logs: unused.

        Raises:
            TypeError: the model's optimizer is of another class.
        """
        # Not `iterations`, which counts updates where gradients are accumulated.
        self._step = max(self._step, int(ops.convert_to_numpy(self._get_optimizer()._iterations)))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Count the batches from 0.

        Args:
            epoch: unused.
            logs: unused.
        """
        self._last_batch = -1

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Look if a look is due.

        Args:
            batch: the index of the last batch in this epoch. Keras 3.10 passes the first one of an execution of several steps,
                so the steps of its looks are too low.
            logs: Keras' metrics; a look logs their loss.
        """
        taken = batch - self._last_batch
        self._last_batch = batch
        self._step += taken
        if self.monitor.due(self._step, taken):
            blocks = list(_iterate_blocks(self._get_optimizer(), self.batch_size))
            if logs and "loss" in logs:
                self.monitor.loss = logs["loss"]
            self.monitor.record(summarize(self._step, blocks, self.batch_size))

    def _get_optimizer(self) -> RuleOptimizer | GradientObserver:
        # On JAX, `self.model` copies the state back into the variables: use it at a look only.
        optimizer = self.model.optimizer
        if not isinstance(optimizer, GradientObserver):
            optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(optimizer, (RuleOptimizer, GradientObserver)):
            name = type(optimizer).__name__
            raise TypeError(f"the model's optimizer is {name}, but must be VSGD, ConstantVSGD or a GradientObserver")
        return optimizer


def _iterate_blocks(optimizer: Any, batch_size: float) -> Iterator[Block]:
    """Yield the state of all variables, by dtype."""
    observes = isinstance(optimizer, GradientObserver)
    groups: dict[str, list[tuple[str, int, list[tuple[Any, ...]]]]] = {}
    for variable, state in zip(optimizer._trainable_variables, optimizer._states, strict=True):
        if state is None or not math.prod(variable.shape):
            continue
        parts = [tuple(map(ops.convert_to_tensor, state))] if observes else get_real_states(state)
        dtype = keras.backend.standardize_dtype(parts[0][0].dtype)
        numbers = math.prod(variable.shape) * (2 if "complex" in keras.backend.standardize_dtype(variable.dtype) else 1)
        groups.setdefault(dtype, []).append((variable.path, numbers, parts))
    for members in groups.values():
        flat = [[tuple(ops.reshape(array, (-1,)) for array in part) for part in parts] for *_, parts in members]
        state = tuple(map(ops.concatenate, zip(*(part for parts in flat for part in parts), strict=True)))
        if observes:
            described = describe_observed(State(*state), batch_size)
        else:
            described = describe_state(state, optimizer._compute_scales(state), None, batch_size)
        names, numbers_of, _ = zip(*members, strict=True)
        sizes = tuple(sum(int(part[0].shape[0]) for part in parts) for parts in flat)
        yield make_block(names, sizes, numbers_of, described, _OPS)


def tensorboard_writer(folder: str) -> Any:
    """Return a sink that writes to TensorBoard: by `tf.summary` on TensorFlow, else by PyTorch's writer.

    Args:
        folder: TensorBoard's folder.

    Returns:
        A sink for `vsgd.monitor.Monitor`; `close()` it at the end.

    Raises:
        ImportError: neither TensorFlow nor PyTorch and TensorBoard are installed.
    """
    if keras.backend.backend() == "tensorflow":
        return _TensorFlowWriter(folder)
    if any(importlib.util.find_spec(name) is None for name in ("torch", "tensorboard")):
        raise ImportError(
            "writing to TensorBoard without TensorFlow needs torch and tensorboard: pip install torch tensorboard"
        )
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


class _TensorFlowWriter:
    """A writer by `tf.summary`, with the methods of PyTorch's writer."""

    def __init__(self, folder: str) -> None:
        import tensorflow as tf

        self._summary = tf.summary
        self._writer = tf.summary.create_file_writer(folder)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        with self._writer.as_default():
            self._summary.scalar(tag, value, step=step)

    def close(self) -> None:
        self._writer.close()
