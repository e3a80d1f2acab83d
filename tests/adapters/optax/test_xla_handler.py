"""Test steps by numba's handler in XLA: where it is chosen, what it must compute there, and what it must survive.

The contract and the matrix test what each step computes, in all dtypes and rules, by the driver `optax-jit-numba`.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drivers.processes import TESTS

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
pytest.importorskip("numba")

import jax.numpy as jnp  # noqa: E402
from adapters.optax.optax_problems import assert_same, gradients, make_step, train  # noqa: E402
from drivers.optax_driver import BY_HANDLER, BY_XLA  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from vsgd import core  # noqa: E402
from vsgd.backends import jax_step  # noqa: E402
from vsgd.optax import vsgd  # noqa: E402

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the handler is for Linux"),
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="the handler is for CPUs"),
]

SIZE = 5000
PARAMS = {"a": gradients(1, 300, 700)[0], "b": [gradients(1, SIZE)[0], jnp.float32(0.3)], "empty": jnp.zeros((0, 4))}
GRADS = [jax.tree.map(lambda leaf, i=i: i * leaf, PARAMS) for i in (0.1, 0.7, -0.4)]


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Return the choice of each lowering: a handler's name, or None for XLA."""
    choices: list[str | None] = []

    def choose(*arguments: Any, original: Any = jax_step._choose_handler) -> str | None:
        choices.append(original(*arguments))
        return choices[-1]

    monkeypatch.setattr(jax_step, "_choose_handler", choose)
    # JAX does not lower again what its caches hold.
    jax.clear_caches()
    return choices


def run_compiled(solver: Any) -> Any:
    params, state, step = PARAMS, solver.init(PARAMS), make_step(solver)
    for grads in GRADS:
        params, state = step(params, state, grads)
    return params, state


def run_eagerly(solver: Any) -> Any:
    return train(solver, PARAMS, GRADS)


def run_scan(solver: Any) -> Any:
    def step(carry: Any, factor: Any) -> Any:
        params, state = carry
        updates, state = solver.update(jax.tree.map(lambda leaf: factor * leaf, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(0.1, 3))[0])((PARAMS, solver.init(PARAMS)))


def run_multi_steps(solver: Any) -> Any:
    return run_compiled(optax.MultiSteps(solver, 2))[0]


def run_if_finite(solver: Any) -> Any:
    return run_compiled(optax.apply_if_finite(solver, 3))[0]


def run_clipped(solver: Any) -> Any:
    return run_compiled(optax.chain(optax.clip_by_global_norm(1.0), solver))[0]


def run_rematerialized(solver: Any) -> Any:
    return jax.jit(jax.checkpoint(lambda grads: solver.update(grads, solver.init(PARAMS), PARAMS)[0]))(GRADS[0])


def run_twins(solver: Any) -> Any:
    """Run three runs at once, then from one of their states three steps with different gradients."""

    def start(params: Any) -> Any:
        return solver.update(params, solver.init(params), params)[1]

    factors = jnp.asarray([1.0, 2.0, -1.0])
    scale = jax.vmap(lambda factor: jax.tree.map(lambda leaf: factor * leaf, PARAMS))
    states = jax.jit(jax.vmap(start))(scale(factors))
    state = jax.tree.map(lambda leaf: leaf[1], states)

    def follow(grads: Any) -> Any:
        return solver.update(grads, state, PARAMS)

    return states, jax.jit(jax.vmap(jax.vmap(follow)))(jax.tree.map(lambda leaf: leaf[None], scale(factors)))


def run_with_some_gradients(solver: Any) -> Any:
    return jax.jit(solver.update)({**GRADS[0], "b": [None, jnp.float32(1)]}, solver.init(PARAMS), PARAMS)


RUNS = [each for name, each in [*globals().items()] if name.startswith("run_")]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16", "seed": 3}], ids=["float32", "bfloat16"])
def test_the_handler_is_chosen_and_agrees_with_xla(
    run: Callable[[Any], Any], options: dict[str, Any], chosen: list[str | None]
) -> None:
    with BY_HANDLER:  # the two smallest arrays share a call
        results = run(vsgd(0.1, weight_decay=0.01, **options))
    assert chosen
    assert None not in chosen
    with BY_XLA:
        expected = run(vsgd(0.1, weight_decay=0.01, **options))
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(each, np.float64) for each in (one, other))
        if options:  # one of some thousand roundings depends on a last digit of float32
            assert np.isclose(one, other, rtol=2e-5, atol=2e-6).mean(where=np.isfinite(other)) > 0.995 if other.size else True
        else:
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_injected_hyperparameters_and_derivatives(chosen: list[str | None]) -> None:
    def end(rate: Any) -> Any:
        solver = optax.inject_hyperparams(vsgd)(rate, weight_decay=0.01)
        params, _ = train(solver, PARAMS, GRADS[:2])
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    value = jax.jit(end)(0.1)
    assert chosen
    assert None not in chosen
    derivatives = [jax.jit(derive(end))(0.1) for derive in (jax.grad, jax.jacfwd)]
    with BY_XLA:
        np.testing.assert_allclose(value, jax.jit(end)(0.1), rtol=1e-5)
        np.testing.assert_allclose(derivatives, jax.jit(jax.grad(end))(0.1), rtol=1e-4)


def test_a_donated_step_needs_memory_for_three_arrays_and_others_keep_their_inputs(chosen: list[str | None]) -> None:
    params, solver = [jnp.ones(1 << 18) for _ in range(12)], vsgd(0.1, weight_decay=0.1)
    state = solver.init(params)
    analysis = make_step(solver, donate_argnums=(0, 1)).lower(params, state, params).compile().memory_analysis()
    assert len(chosen) == 12
    assert None not in chosen
    # Each direction is consumed while the next ones are computed.
    assert analysis.temp_size_in_bytes <= 3 * params[0].nbytes + 10_000
    before = jax.tree.map(np.array, (params, state))
    jax.block_until_ready(make_step(solver)(params, state, params))
    assert_same((params, state), before)


def test_small_arrays_share_a_call_for_each_pair_of_dtypes() -> None:
    params = {"large": jnp.ones(5000), **{str(size): jnp.full(size, 0.5) for size in range(3, 3 + jax_step.FEWEST)}}
    params |= {f"half {size}": jnp.ones(size, jnp.bfloat16) for size in range(jax_step.FEWEST - 1)}
    params |= {"one complex": jnp.ones(2, jnp.complex64), "none": None, "empty": jnp.zeros((0, 3))}
    solver = vsgd(0.1)
    text = make_step(solver).lower(params, solver.init(params), params).as_text()
    # One call for the large array, one for all small float32 arrays; the bfloat16 arrays are one too few for a call.
    assert len(re.findall(r"custom_call @vsgd_", text)) == 2


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
def test_an_array_that_shares_a_call_varies_over_the_axes_of_its_own() -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = {"shard": P("x"), "replica": P()}
    params = {"shard": jnp.arange(4.0), "replica": jnp.arange(6.0)}
    step = jax.shard_map(
        lambda each: vsgd(0.1).update(each, vsgd(0.1).init(each), each)[0], mesh=mesh, in_specs=(spec,), out_specs=spec
    )
    with BY_HANDLER:
        sharded = jax.jit(step)(params)
    assert_same(sharded, vsgd(0.1).update(params, vsgd(0.1).init(params), params)[0], rtol=1e-6)


# --- Cases where XLA compiles the step. ---


@pytest.mark.parametrize("broken", ["jax.ffi.register_ffi_target", "vsgd.backends.xla_handler.compile_handler"])
def test_what_is_missing_or_refused_leaves_the_step_to_xla(
    broken: str, monkeypatch: pytest.MonkeyPatch, chosen: list[str | None]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(broken, refuse)
    jax_step._register_handler.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run_compiled(vsgd(0.1))
    jax_step._register_handler.cache_clear()
    assert chosen == [None] * 2
    with BY_XLA:
        assert_same(result, run_compiled(vsgd(0.1)), rtol=1e-5)


def test_xla_refuses_a_handler_of_another_version() -> None:
    from vsgd.backends import xla_handler

    @ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
    def answer(address: int) -> int:
        extension, metadata = (ctypes.c_int64.from_address(at) for at in (address + 8, address))
        metadata = ctypes.c_int64.from_address(extension.value + xla_handler._EXTENSION.fields["metadata"][1])
        ctypes.c_int32.from_address(metadata.value + xla_handler._METADATA.fields["major"][1]).value = -1
        return 0

    capsule = jax.ffi.pycapsule(ctypes.cast(answer, ctypes.c_void_p).value)
    with pytest.raises(Exception, match="version"):
        jax.ffi.register_ffi_target("vsgd_refused", capsule, platform="cpu")


def test_an_exported_step_holds_no_handler(chosen: list[str | None]) -> None:
    pytest.importorskip("flatbuffers")
    from jax import export

    solver = vsgd(0.1)
    leaves, tree = jax.tree.flatten((GRADS[0], solver.init(PARAMS), PARAMS))
    step = jax.jit(lambda *leaves: jax.tree.leaves(solver.update(*tree.unflatten(leaves))))
    saved = [export.export(step, platforms=platforms)(*leaves).serialize() for platforms in (["cpu"], ["cpu", "cuda", "tpu"])]
    assert set(chosen) == {None}
    for each in saved:
        assert_same(export.deserialize(each).call(*leaves), step(*leaves), rtol=1e-5)


# --- The handler called without XLA. ---


class Frame:
    """A call frame like XLA's, for one array, with an API of ctypes functions."""

    def __init__(self, size: int, schedule: Callable[[int, int], int], threads: int | None) -> None:
        from vsgd.backends import xla_handler

        self.structs = xla_handler
        self.keep: list[Any] = []
        self.errors_destroyed = 0
        rule, rng = core.VSGD, np.random.default_rng(0)
        numbers = np.array([*rule.coefficients(3.0, rule.hyperparameters()), 1.0], np.float32)
        self.grad = rng.standard_normal(size, np.float32)
        self.state = [np.zeros(size, np.float32), *(rng.uniform(0.1, 1, size).astype(np.float32) for _ in range(2))]
        state = tuple(map(np.copy, self.state))
        self.expected = rule.make_update(np)(self.grad, state, rule.coefficients(3.0, rule.hyperparameters()))
        self.direction = np.zeros(size, np.float32)
        self.frame = np.zeros(1, xla_handler._FRAME)
        turn = np.zeros((), np.int32)
        arguments = [numbers, np.zeros((), np.int32), turn, self.grad, *self.state]
        for role, arrays in (("arguments", arguments), ("results", [turn, self.direction, *self.state])):
            self.frame[f"{role}_count"], self.frame[f"{role}_items"] = len(arrays), self.address(self.make_buffers(arrays))
        kinds = {"get_threads": (self.get_threads, 1), "schedule": (self.schedule, 1), "destroy_error": (self.destroy, 1)}
        api = np.zeros(1, xla_handler._API)
        api["size"] = xla_handler._API.itemsize
        for name, (function, _) in kinds.items():
            callback = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(function)
            self.keep.append(callback)
            api[name] = ctypes.cast(callback, ctypes.c_void_p).value
        self.run, self.threads = schedule, threads
        self.frame["size"], self.frame["api"], self.frame["stage"] = self.frame.itemsize, self.address(api), 3

    def address(self, array: np.ndarray) -> int:
        self.keep.append(array)
        return array.ctypes.data

    def make_buffers(self, arrays: list[np.ndarray]) -> np.ndarray:
        buffers = np.zeros(len(arrays), self.structs._BUFFER)
        for buffer, array in zip(buffers, arrays, strict=True):
            buffer["data"], buffer["rank"] = self.address(array), array.ndim
            buffer["dimensions"] = self.address(np.array(array.shape, np.int64))
        self.address(buffers)
        return buffers.ctypes.data + buffers.itemsize * np.arange(len(arrays))

    def read_call(self, address: int) -> list[int]:
        return list((ctypes.c_int64 * 5).from_address(address))[2:]

    def get_threads(self, address: int) -> int:
        if self.threads is None:
            return 1  # the address of an error
        ctypes.c_int64.from_address(self.read_call(address)[1]).value = self.threads
        return 0

    def schedule(self, address: int) -> int:
        return self.run(*self.read_call(address)[1:])

    def destroy(self, address: int) -> int:
        self.errors_destroyed += self.read_call(address)[0] == 1
        return 0

    def call(self) -> int:
        handler = self.structs.compile_handler(core.VSGD, np.float32, np.float32)
        result: int = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(handler.address)(self.frame.ctypes.data)
        return result


def run_at_once(function: int, data: int) -> int:
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(function)(data)
    return 0


LATER: list[tuple[int, int]] = []


@pytest.mark.parametrize(
    ("threads", "schedule", "errors"),
    [
        (1, run_at_once, 0),
        (4, run_at_once, 0),
        (4, lambda *task: LATER.append(task) or 0, 0),
        (4, lambda *task: 1, 1),
        (None, run_at_once, 1),
    ],
    ids=["alone", "in the caller's thread", "after the step", "refused", "no threads"],
)
def test_the_step_is_whole_however_tasks_are_run(threads: int | None, schedule: Any, errors: int) -> None:
    made = Frame(300_000, schedule, threads)
    assert made.call() == 0
    while LATER:  # a late task finds nothing to do, although the frame is gone
        made.frame[:] = 0
        run_at_once(*LATER.pop())
    assert made.errors_destroyed == errors
    direction, state = made.expected
    for ours, theirs in zip((made.direction, *made.state), (direction, *state), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("change", "major"), [(0, 0), (8, 0), (16, -1), (-8, -1)])
def test_the_handler_tells_a_version_only_for_the_call_frames_that_it_knows(change: int, major: int) -> None:
    made = Frame(1, run_at_once, 1)
    extension, metadata = np.zeros(1, made.structs._EXTENSION), np.zeros(1, made.structs._METADATA)
    extension["kind"], extension["metadata"] = 1, metadata.ctypes.data
    made.frame["size"] += change
    made.frame["extension"] = extension.ctypes.data
    assert made.call() == 0
    assert (metadata["major"].item(), metadata["minor"].item()) == (major, 1)
    assert not made.direction.any()


def test_another_api_lets_one_thread_work() -> None:
    made = Frame(300_000, run_at_once, None)
    made.keep[-1]["size"] -= 8
    made.call()
    assert made.errors_destroyed == 0
    np.testing.assert_allclose(made.direction, made.expected[0], rtol=1e-5, atol=1e-7)


# --- Processes, threads and devices. ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["threads", "fork", "kernels", "saved", "devices"])
def test_processes_end_well_also_with_what_the_last_one_compiled(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    environment |= {"NUMBA_CACHE_DIR": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for _ in range(2):
        command = [sys.executable, "-X", "faulthandler", "-m", "adapters.optax.xla_handler_scripts", name, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert "Fatal" not in done.stderr
