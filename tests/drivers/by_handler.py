"""A plugin of pytest, `-p drivers.by_handler`: JAX steps all arrays by numba's handler, small ones too."""


def pytest_configure() -> None:
    from vsgd.backends import jax_step

    jax_step.SMALLEST = 0
