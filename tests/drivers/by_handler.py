"""A pytest plugin, `-p drivers.by_handler`: JAX steps all arrays, including small ones, with numba's handler."""


def pytest_configure() -> None:
    from vsgd.backends import jax_step

    jax_step.SMALLEST = 0
