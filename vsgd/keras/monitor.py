"""Watching a Keras training: see `vsgd.monitor`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from vsgd import core
from vsgd.keras.optimizer import RuleOptimizer
from vsgd.keras.posterior import real_states
from vsgd.monitor import Monitor
from vsgd.monitor.summaries import Arrays, Block, digest, summarize

__all__ = ["MonitorCallback", "tensorboard_writer"]

_ARRAYS = Arrays(
    ops.sum, lambda table, sizes: ops.split(table, np.cumsum(sizes)[:-1].tolist(), axis=1), ops.stack, ops.concatenate, ops.take
)


class MonitorCallback(keras.callbacks.Callback):
    """Looks at the model's optimizer after every so manieth batch.

    A callback sees no gradients, so the surprise is not known; in a training loop of your own, `optimizer.surprise(grads)`
    tells it. With `steps_per_execution` it looks after the execution in which a look was due. Steps are counted in batches,
    also where gradients are accumulated, on from those that the optimizer has taken: so a second `fit` goes on counting, and a
    loaded model.

    Args:
        monitor: says when to look and writes what is seen.
        batch_size: how many examples a gradient is the mean of, on all devices and in accumulated steps together; at 1 the
            noise scale counts batches.

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
        core.validate(batch_size=batch_size)
        super().__init__()
        self.monitor = monitor
        self.batch_size = batch_size
        self._step = 0
        self._last_batch = -1

    def on_train_begin(self, logs: Any = None) -> None:
        """Refuse a model whose optimizer is another, and count on from its steps.

        Args:
            logs: unused.

        Raises:
            TypeError: the model's optimizer is of another class.
        """
        # Not `iterations`, which counts updates where gradients are accumulated.
        self._step = max(self._step, int(ops.convert_to_numpy(self._optimizer()._iterations)))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Count the batches from 0.

        Args:
            epoch: unused.
            logs: unused.
        """
        self._last_batch = -1

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Look, where it is time to.

        Args:
            batch: the number of the last batch that was taken in this epoch.
            logs: unused.
        """
        taken = batch - self._last_batch
        self._last_batch = batch
        self._step += taken
        if self.monitor.due(self._step, taken):
            self.monitor.record(summarize(self._step, list(_blocks(self._optimizer())), self._look, self.batch_size))

    def _look(self, block: Block, places: Any) -> Any:
        return ops.convert_to_numpy(digest(block, places, _ARRAYS, self.batch_size))

    def _optimizer(self) -> Any:
        # On JAX, `self.model` brings the state back into the variables: not to be asked for at every batch.
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(optimizer, RuleOptimizer):
            raise TypeError(f"the model's optimizer is {type(optimizer).__name__}, but must be VSGD or ConstantVSGD")
        return optimizer


def _blocks(optimizer: Any) -> Iterator[Block]:
    """The state of all variables, by dtype."""
    kinds: dict[str, list[tuple[str, list[tuple[Any, ...]]]]] = {}
    for variable, state in zip(optimizer._trainable_variables, optimizer._states, strict=True):
        parts = [] if state is None else real_states(state)
        if parts and ops.size(parts[0][0]):
            kinds.setdefault(keras.backend.standardize_dtype(parts[0][0].dtype), []).append((variable.path, parts))
    for members in kinds.values():
        flat = [[tuple(ops.reshape(array, (-1,)) for array in part) for part in parts] for _, parts in members]
        yield Block(
            names=[name for name, _ in members],
            sizes=tuple(sum(int(part[0].shape[0]) for part in parts) for parts in flat),
            state=tuple(map(ops.concatenate, zip(*(part for parts in flat for part in parts), strict=True))),
            scales=optimizer._scales(),
            grads=None,
        )


def tensorboard_writer(folder: str) -> Any:
    """What writes to TensorBoard with what the backend has: `tf.summary` on TensorFlow, else PyTorch's writer.

    Args:
        folder: where TensorBoard looks.

    Returns:
        A sink for `vsgd.monitor.Monitor`; `close()` it at the end.

    Raises:
        ImportError: neither is installed.
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
    """`tf.summary` by the names of PyTorch's writer."""

    def __init__(self, folder: str) -> None:
        import tensorflow as tf

        self._summary = tf.summary
        self._writer = tf.summary.create_file_writer(folder)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        with self._writer.as_default():
            self._summary.scalar(tag, value, step=step)

    def close(self) -> None:
        self._writer.close()
