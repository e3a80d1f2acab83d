"""VSGD: Variational Stochastic Gradient Descent (arXiv 2404.06549) for PyTorch, Keras, JAX, MLX and NumPy.

The package imports no framework. Import the adapter that you need:

- `vsgd.torch`: `VSGD` and `ConstantVSGD` as `torch.optim.Optimizer`.
- `vsgd.optax`: `vsgd` and `constant_vsgd` as optax gradient transformations.
- `vsgd.keras`: `VSGD` and `ConstantVSGD` as `keras.optimizers.Optimizer`, on any Keras backend.
- `vsgd.mlx`: `VSGD` and `ConstantVSGD` as `mlx.optimizers.Optimizer`.
- `vsgd.numpy`: `VSGD` and `ConstantVSGD` for lists of arrays, the readable reference.
- `vsgd.core`: the update, written once for all array libraries.
"""

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    if name in ("VSGD", "ConstantVSGD"):
        adapters = "vsgd.torch, vsgd.keras, vsgd.mlx or vsgd.numpy"
        raise AttributeError(f"vsgd has no {name} of its own: import it from {adapters}; vsgd.optax has vsgd and constant_vsgd")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
