"""The core on each array library.

A backend is one of two things:

- operations for the core's functions, see `vsgd.ops`. `numpy`, `torch`, `jax.numpy`, `mlx.core` and `keras.ops` are `ArrayOps`
  as they are; `torch.foreach` adds those of lists of tensors, `numba_ops` those of compiled code, and `jax`, `keras` and
  `torch.rounding` the `BitOps` of stochastic rounding.
- a way to run the core's update: `numba` and `torch.fused_cuda` compile it into one loop over many tensors, `torch.loop` and
  `torch.foreach` run it block by block.

A backend takes a `vsgd.core.Rule` and never states the update itself. It imports its framework and the modules of `vsgd` that
import no framework, and never an adapter.
"""
