"""Scripts in which steps by numba's handler must not fail, each run in a separate process."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if sys.argv[1:2] == ["devices"]:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drivers.optax_driver import BY_XLA
from jax.experimental import serialize_executable
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vsgd import core
from vsgd.backends import jax_step
from vsgd.backends.xla_handler import compile_handler
from vsgd.optax import constant_vsgd, vsgd
from vsgd.outliers import choose_rule

SIZE = 200_000


def step_by(solver: Any) -> Any:
    def step(params: Any, grads: Any, state: Any) -> Any:
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def assert_close(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=1e-6), ours, theirs)


def run_threads(folder: Path) -> None:
    """Step in 16 threads at once."""
    solver, params = vsgd(0.1), jnp.linspace(-1, 1, SIZE)
    state = solver.init(params)
    step = jax.jit(solver.update)
    expected = jax.tree.map(np.asarray, step(params, state, params))
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.extend(step(params, state, params) for _ in range(30))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16 * 30
    for result in results:
        jax.tree.map(np.testing.assert_array_equal, result, expected)
    with BY_XLA:
        assert_close(expected, jax.jit(lambda *each: solver.update(*each))(params, state, params))


def run_fork(folder: Path) -> None:
    """Step in a child that was forked after a handler was compiled; JAX must not have run, or it cannot run in the child."""
    jax_step._register_handler(core.VSGD, "float32", "float32")
    child = os.fork()
    if child == 0:
        run_threads(folder)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def run_kernels(folder: Path) -> None:
    """Step by several handlers in one process, which loads them from disk if another process has compiled them."""
    done = folder / "compiled"
    params = jnp.linspace(-1, 1, SIZE)
    for make, rule in ((vsgd, core.VSGD), (constant_vsgd, core.CONSTANT_VSGD)):
        for options in ({}, {"outlier_threshold": 2.0}):
            ends = []
            for limit in (0, 2**62):
                jax_step.SMALLEST = limit
                solver = make(0.1, **options)
                state, end = solver.init(params), params
                for _ in range(3):
                    end, state = jax.jit(step_by(solver))(end, params, state)
                ends.append((end, state))
            assert_close(*ends)
            handler = compile_handler(choose_rule(rule, options.get("outlier_threshold")), np.float32, np.float32)
            assert [each.cache_hits for each in handler.code] == [done.exists()] * 2
    done.touch()


def run_saved(folder: Path) -> None:
    """Load an executable in a process that has lowered no step, and in one that has."""
    solver, params = vsgd(0.1), jnp.ones(SIZE)
    arguments = params, solver.init(params), params
    saved = folder / "executable"
    if saved.exists():
        with pytest.raises(jax.errors.JaxRuntimeError, match="No FFI handler registered for vsgd_"):
            serialize_executable.deserialize_and_load(*pickle.loads(saved.read_bytes()))
    lowered = jax.jit(solver.update).lower(*arguments)
    if not saved.exists():
        # Bypass the persistent cache, which holds no code to save.
        jax.config.update("jax_enable_compilation_cache", False)
        saved.write_bytes(pickle.dumps(serialize_executable.serialize(lowered.compile())))
    loaded = serialize_executable.deserialize_and_load(*pickle.loads(saved.read_bytes()))
    jax.tree.map(np.testing.assert_array_equal, loaded(*arguments), lowered.compile()(*arguments))


def run_devices(folder: Path) -> None:
    """Step sharded, by XLA and by handlers, without communication; and on eight devices at once."""
    solver = vsgd(0.1)
    step = step_by(solver)
    params = {"w": jnp.linspace(-1, 1, 1 << 17).reshape(256, 512), "v": jnp.linspace(0, 1, 1 << 14)}
    grads = jax.tree.map(lambda leaf: 0.1 * leaf, params)
    spec = {"w": P("x", "y"), "v": P("y")}
    with BY_XLA:
        expected = jax.jit(step)(params, grads, solver.init(params))

    def check(function: Any, arguments: Any, by_handler: bool) -> None:
        compiled = function.lower(*arguments).compile()
        text = compiled.as_text()
        assert ("vsgd_" in text) == by_handler
        for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
            assert name not in text
        assert_close(compiled(*arguments), expected)

    def shard(mesh: Any, tree: Any) -> Any:
        return jax.device_put(tree, {name: NamedSharding(mesh, each) for name, each in spec.items()})

    def list_specs(specs: Any) -> Any:
        state = jax.eval_shape(solver.init, params)
        return (type(state[0])(P(), specs, specs, specs, P(), P()), *jax.tree.map(lambda _: P(), state[1:]))

    # JAX 0.6.0 has no sharding in types.
    for kind in (AxisType.Auto, *([AxisType.Explicit] if hasattr(jax, "set_mesh") else [])):
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
        with jax.set_mesh(mesh) if kind == AxisType.Explicit else nullcontext():
            sharded = shard(mesh, params), shard(mesh, grads)
            check(jax.jit(lambda *each: step(*each)), (*sharded, jax.jit(solver.init)(sharded[0])), False)

    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharded = shard(mesh, params), shard(mesh, grads)
    arguments = (*sharded, jax.jit(solver.init)(sharded[0]))
    specs = spec, spec, list_specs(spec)
    check(jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs[1:])), arguments, True)
    rows = {"w": P("x"), "v": P()}
    specs = rows, rows, list_specs(rows)
    by_rows = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs[1:], axis_names={"x"})
    assert_close(jax.jit(by_rows)(*arguments), expected)

    copies = [jax.device_put((params, grads, solver.init(params)), device) for device in jax.devices()]
    everywhere = jax.jit(lambda *each: step(*each))
    for result in [everywhere(*each) for _ in range(10) for each in copies]:
        assert_close(result, expected)


if __name__ == "__main__":
    globals()[f"run_{sys.argv[1]}"](Path(sys.argv[2]))
