"""Check replicas, and errors under a strategy, in the process with Keras on TensorFlow."""

from __future__ import annotations

from typing import Any

import keras
import pytest
import tensorflow as tf
from scaling.keras_distributed import STRATEGY, assert_copies_are_equal
from scaling.keras_network import compiled, fit, gradients, optimizer_of, stepped_apart

from vsgd.keras import GradientObserver


def equal_gradients(case: str) -> tuple[float, float]:
    """Return the deviations of optimizer and noise scale when two replicas hold parts of the gradients."""
    with STRATEGY.scope():
        many = compiled(case)
        many.optimizer.build(many.trainable_variables)
    one = compiled(case)

    @tf.function(autograph=False)
    def apply_parts(grads: list[Any]) -> None:
        # The first replica has one and a half times the gradients, and the second minus one half.
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        parts = [tf.where(number == 0, 1.5 * grad, -0.5 * grad) for grad in grads]
        many.optimizer.apply(parts, many.trainable_variables)

    @tf.function(autograph=False)
    def apply(grads: list[Any]) -> None:
        one.optimizer.apply(grads, one.trainable_variables)

    for grads in gradients(one):
        cast = [tf.cast(grad, each.dtype) for grad, each in zip(grads, one.trainable_variables, strict=True)]
        STRATEGY.run(apply_parts, args=(cast,))
        apply(cast)
    assert_copies_are_equal(many)
    return stepped_apart(many, one)


def refuse_what_is_made_outside() -> None:
    """Assert that a strategy rejects state made outside it, which would be stepped once for each replica."""
    outside = optimizer_of("VSGD")
    with STRATEGY.scope():
        model = compiled("VSGD")
    with pytest.raises(RuntimeError, match=r'Need to be inside "with strategy\.scope\(\)"'):
        model.optimizer.build(model.trainable_variables)
    with STRATEGY.scope():
        model.compile(optimizer=outside, loss="mse")
    with pytest.raises(RuntimeError, match=r"Mixing different tf\.distribute\.Strategy objects"):
        fit(model)
    with STRATEGY.scope():
        observer = GradientObserver(keras.optimizers.SGD())
        with pytest.raises(ValueError, match="the strategy has 2 replicas, but a GradientObserver must have one"):
            observer.build(model.trainable_variables)
