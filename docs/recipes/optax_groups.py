"""Train with VSGD in JAX and decay only matrices, on scikit-learn's handwritten digits (8x8 pixels, no download).

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


def mask_matrices(params: Any) -> Any:
    """Select arrays of at least two dimensions for decay; biases and norms' scales have one."""
    return jax.tree.map(lambda param: param.ndim >= 2, params)


def mask_by_name(params: Any) -> Any:
    """Select by name, for stacked layers whose biases have two dimensions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)


def compute_logits(params: Any, images: jax.Array) -> jax.Array:
    """Apply a layer, a norm and a second layer."""
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
    solver = vsgd(0.01, weight_decay=0.1, mask=mask_matrices)

    def loss(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(compute_logits(params, images), labels).mean()

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
