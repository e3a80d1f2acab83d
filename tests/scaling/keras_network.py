"""A small network with a normalization, trained by Keras, and comparisons of two trainings."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
from adapters.keras.keras_problems import to_numpy
from scaling import compare

from vsgd import keras as vsgd_keras

FEATURES, HIDDEN, OUTPUTS = 6, 8, 2
SAMPLES, BATCH, EPOCHS = 64, 16, 2  # 8 steps
_rng = np.random.default_rng(0)
X = _rng.standard_normal((SAMPLES, FEATURES)).astype(np.float32)
Y = _rng.standard_normal((SAMPLES, OUTPUTS)).astype(np.float32)


class Case(NamedTuple):
    """What is trained, and how.

    Attributes:
        kind: the optimizer's class.
        policy: the layers' dtype policy.
        options: the optimizer's options.
    """

    kind: str
    policy: str
    options: dict[str, Any]


CASES = {
    "VSGD": Case("VSGD", "float32", {}),
    "ConstantVSGD": Case("ConstantVSGD", "float32", {}),
    "average of the weights": Case("VSGD", "float32", {"use_ema": True, "ema_momentum": 0.5}),
    "calibrated": Case("VSGD", "float32", {"prior_strength": "auto"}),
    "mixed precision": Case("VSGD", "mixed_bfloat16", {}),
    "bfloat16 state": Case("VSGD", "float32", {"state_dtype": "bfloat16"}),
    "bfloat16 state and variables": Case("VSGD", "bfloat16", {"state_dtype": "bfloat16", "stochastic_rounding": True}),
}


def optimizer_of(case: str) -> Any:
    """Return the case's optimizer; weights decay, biases and normalizations do not."""
    optimizer = getattr(vsgd_keras, CASES[case].kind)(learning_rate=0.05, weight_decay=0.1, **CASES[case].options)
    spare(optimizer)
    return optimizer


def spare(optimizer: Any) -> None:
    """Exclude biases and normalizations from weight decay; a loaded optimizer needs this again, because no file stores it."""
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])


def compiled(case: str) -> Any:
    """Return the network, compiled with its optimizer and loss."""
    keras.utils.set_random_seed(0)
    policy = CASES[case].policy
    layers = [
        keras.layers.Dense(HIDDEN, activation="tanh", name="first", dtype=policy),
        keras.layers.LayerNormalization(name="norm", dtype=policy),
        keras.layers.Dense(OUTPUTS, name="second", dtype=policy),
    ]
    model = keras.Sequential([keras.Input((FEATURES,)), *layers], name="net")
    model.compile(optimizer=optimizer_of(case), loss="mse")
    return model


def fit(model: Any) -> Any:
    """Train the model on batches in order, and return it."""
    model.fit(X, Y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)
    return model


def gradients(model: Any) -> list[list[np.ndarray]]:
    """Return gradients for some steps: multiples of 1/8, whose parts have exact sums even in bfloat16."""
    rng, shapes = np.random.default_rng(1), [each.shape for each in model.trainable_variables]
    return [[np.round(8 * rng.standard_normal(shape)).astype(np.float32) / 8 for shape in shapes] for _ in range(4)]


def arrays(model: Any) -> list[np.ndarray]:
    """Return all weights and optimizer variables, in order; paths would differ in a loaded model."""
    return [to_numpy(each) for each in [*model.weights, *model.optimizer.variables]]


def stepped_apart(one: Any, other: Any) -> tuple[float, float]:
    """Return the differences of two models' arrays, and of their optimizers' overall noise scales."""
    scales = [[to_numpy(each) for each in model.optimizer.noise_scale(batch_size=BATCH).overall] for model in (one, other)]
    return apart(arrays(one), arrays(other)), apart(*scales)


def apart(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    """Return the largest difference of any array, relative to the array's largest value."""
    return max(compare.apart(one, other) for one, other in zip(some, others, strict=True))
