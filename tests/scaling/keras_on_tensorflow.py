"""What the process with Keras on TensorFlow says of replicas, of clipping, and of what is refused under a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from scaling.keras_distributed import STRATEGY, trained
from scaling.keras_network import (
    BATCH,
    EPOCHS,
    SAMPLES,
    X,
    Y,
    apart,
    arrays,
    compiled,
    fit,
    gradients,
    noise_scale,
    optimizer_of,
)

Copies = tuple[set[int], set[int]]


def mirrored(case: str) -> tuple[float, Copies]:
    """How far a training strayed; on how many devices its variables are, and how many values each has."""
    model, strayed = trained(case, "MirroredStrategy")
    return strayed, _copies(model)


def _copies(model: Any) -> Copies:
    copies = [[copy.numpy().tobytes() for copy in each.value.values] for each in [*model.weights, *model.optimizer.variables]]
    return {len(each) for each in copies}, {len(set(each)) for each in copies}


def equal_gradients(case: str) -> tuple[float, float, Copies]:
    """How far the optimizer strayed by gradients that two replicas have in parts, and its noise scale; and the copies."""
    with STRATEGY.scope():
        many = compiled(case)
        many.optimizer.build(many.trainable_variables)
    one = compiled(case)

    @tf.function(autograph=False)
    def apply_parts(grads: list[Any]) -> None:
        _apply(many, _part(grads))

    @tf.function(autograph=False)
    def apply(grads: list[Any]) -> None:
        _apply(one, grads)

    for grads in gradients():
        cast = [tf.cast(grad, each.dtype) for grad, each in zip(grads, one.trainable_variables, strict=True)]
        STRATEGY.run(apply_parts, args=(cast,))
        apply(cast)
    return apart(arrays(many), arrays(one)), apart(noise_scale(many), noise_scale(one)), _copies(many)


def _part(grads: list[Any]) -> list[Any]:
    """One and a half of the gradients on the first replica, less the half on the second."""
    number = tf.distribute.get_replica_context().replica_id_in_sync_group
    return [tf.where(number == 0, 1.5 * grad, -0.5 * grad) for grad in grads]


def _apply(model: Any, grads: list[Any]) -> None:
    model.optimizer.apply(grads, model.trainable_variables)


def clipped(limit: dict[str, float]) -> float:
    """How far a clipped training strayed from one device that clips what each of two replicas adds to the gradient."""
    with STRATEGY.scope():
        many = fit(compiled("VSGD", **limit))
    one = compiled("VSGD")
    for start in list(range(0, SAMPLES, BATCH)) * EPOCHS:
        halves = [slice(start, start + BATCH // 2), slice(start + BATCH // 2, start + BATCH)]
        parts = [_clipped(_gradients(one, X[half], Y[half]), **limit) for half in halves]
        _apply(one, [first + second for first, second in zip(*parts, strict=True)])
    return apart(arrays(many), arrays(one))


def _gradients(model: Any, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    with tf.GradientTape() as tape:
        loss = keras.ops.mean(keras.ops.square(model(x) - y)) / 2
    return [each.numpy() for each in tape.gradient(loss, [each.value for each in model.trainable_variables])]


def _clipped(
    grads: list[np.ndarray], clipnorm: float = np.inf, clipvalue: float = np.inf, global_clipnorm: float = np.inf
) -> list[np.ndarray]:
    grads = [np.clip(grad, -clipvalue, clipvalue) for grad in grads]
    norms = [np.linalg.norm(grad) for grad in grads]
    scale = min(1, global_clipnorm / np.linalg.norm(norms))
    return [grad * np.float32(min(scale, clipnorm / norm)) for grad, norm in zip(grads, norms, strict=True)]


def refused() -> dict[str, str]:
    """What is said of each training that does not run under a strategy."""
    outside = optimizer_of("VSGD")
    return {
        "jit_compile": _said(lambda: fit(_made(jit_compile=True))),
        "gradient accumulation": _said(lambda: fit(_made(gradient_accumulation_steps=2))),
        "overwriting by the average": _said(lambda: fit(_made(use_ema=True, ema_overwrite_frequency=2))),
        "built outside": _said(lambda: (model := _made()).optimizer.build(model.trainable_variables)),
        "made outside": _said(lambda: fit(_made(outside))),
    }


def _made(optimizer: Any = None, **options: Any) -> Any:
    with STRATEGY.scope():
        model = compiled("VSGD", **options)
        if optimizer is not None:
            model.compile(optimizer=optimizer, loss="mse")
    return model


def _said(run: Callable[[], Any]) -> str:
    try:
        run()
    except (RuntimeError, tf.errors.InvalidArgumentError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
