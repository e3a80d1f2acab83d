"""Train five networks at once with VSGD in plain JAX: an MLP on scikit-learn's digits, one seed each.

An epoch of all seeds is one compiled program: `jax.lax.scan` over the steps, `jax.vmap` over the seeds.

    pip install '.[optax]' scikit-learn tqdm
    python examples/jax_training.py
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

from vsgd.optax import constant_vsgd

BATCH_SIZE, TEST, SEEDS = 64, 389, 5  # the other 1408 images are 22 batches
WIDTHS = (64, 128, 128, 10)

pixels, digits = load_digits(return_X_y=True)
images, labels = jnp.asarray(pixels / 8 - 1, jnp.float32), jnp.asarray(digits)
solver = constant_vsgd(0.008)


def init_params(key: jax.Array) -> list[dict[str, jax.Array]]:
    """Make weights by He's rule and zero biases."""
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return [
        {"weight": jax.random.normal(each, (fan_in, fan_out)) * jnp.sqrt(2 / fan_in), "bias": jnp.zeros(fan_out)}
        for each, fan_in, fan_out in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]


def compute_logits(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Apply the MLP."""
    for layer in params[:-1]:
        x = jax.nn.gelu(x @ layer["weight"] + layer["bias"])
    return x @ params[-1]["weight"] + params[-1]["bias"]


def compute_loss(params: list[dict[str, jax.Array]], batch: jax.Array) -> jax.Array:
    """Compute the mean cross-entropy of a batch, given by its indices."""
    return optax.softmax_cross_entropy_with_integer_labels(compute_logits(params, images[batch]), labels[batch]).mean()


@jax.jit
@jax.vmap
def train_epoch(training: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
    """Take a step on each mini-batch, in a new order; return the parameters and the state, and the mean loss."""

    def step(training: tuple[Any, Any], batch: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = training
        loss, grads = jax.value_and_grad(compute_loss)(params, batch)
        updates, state = solver.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    order = jax.random.permutation(key, len(images) - TEST)
    training, losses = jax.lax.scan(step, training, order.reshape(-1, BATCH_SIZE))
    return training, losses.mean()


parser = argparse.ArgumentParser(description="Train an MLP on scikit-learn's digits with VSGD, in plain JAX.")
parser.add_argument("--epochs", type=int, default=30, help="passes over the training data (default: %(default)s)")
epochs = parser.parse_args().epochs
params = jax.vmap(init_params)(jax.random.split(jax.random.key(0), SEEDS))
training = params, jax.vmap(solver.init)(params)
for epoch in tqdm(range(epochs), unit="epoch"):
    training, losses = train_epoch(training, jax.random.split(jax.random.key(epoch + 1), SEEDS))
correct = jax.vmap(compute_logits, (0, None))(training[0], images[-TEST:]).argmax(-1) == labels[-TEST:]
for seed, (loss, accuracy) in enumerate(zip(losses, correct.mean(1), strict=True)):
    print(f"seed {seed}: loss {loss:.1e}, test accuracy {accuracy:.1%}")
