"""What the core runs on.

A backend is one of two things:

- an array namespace: an object `xp` with `sqrt`, whose arrays have arithmetic operators. `numpy`, `torch`, `jax.numpy`,
  `mlx.core` and `keras.ops` are such namespaces as they are; `torch_foreach` adds lists of tensors, `jax_rounding` and
  `keras_arrays` what JAX and Keras lack for stochastic rounding.
- a compiler or scheduler of the core's update: `numba_cpu` and `torch_triton` compile it into one loop over many tensors,
  `torch_loop` runs it block by block.

A backend takes a `vsgd.core.Rule` (or its update) and never states the update itself. It imports its framework,
`vsgd.core` and `vsgd.rounding`, nothing of the adapters, and no adapter's user pays for a backend that is not used. `sources`
imports the rules' other modules too, only to hash their source for the compilers' disk caches.
"""
