"""VSGD in JAX with weight decay for matrices alone, on scikit-learn's handwritten digits (8x8 pixels, no download).

To run it:

    pip install '.[optax]' scikit-learn
    python docs/recipes/optax_groups.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from vsgd.optax import vsgd


def matrices(params: Any) -> Any:
    """What is decayed: biases and the scales of norms have one dimension, and are not."""
    return jax.tree.map(lambda param: param.ndim >= 2, params)


def by_name(params: Any) -> Any:
    """The same where layers are stacked, so that a bias has two dimensions: by the last name of each."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)


def logits(params: Any, images: jax.Array) -> jax.Array:
    """A layer, normalized, and another."""
    hidden = jax.nn.standardize(images @ params["first"]["kernel"] + params["first"]["bias"])
    hidden = jax.nn.gelu(hidden * params["norm"]["scale"])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"]


def main() -> Any:
    """Train for 50 steps on all digits at once."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(pixels / 8 - 1, jnp.float32), jnp.asarray(labels)
    keys = jax.random.split(jax.random.key(0))
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (64, 64)) / 8, "bias": jnp.zeros(64)},
        "norm": {"scale": jnp.ones(64)},
        "last": {"kernel": jax.random.normal(keys[1], (64, 10)) / 8, "bias": jnp.zeros(10)},
    }
    solver = vsgd(0.01, weight_decay=0.1, mask=matrices)

    def loss(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels).mean()

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = solver.init(params)
    for _ in range(50):
        params, state, value = step(params, state)
    print(f"loss {value:.3f}")
    return params


if __name__ == "__main__":
    main()
