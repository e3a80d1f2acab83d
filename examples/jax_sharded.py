"""Sharded training that survives: VSGD on a mesh of devices, with orbax checkpoints, resumed where it was killed.

Trains a small network on scikit-learn's handwritten digits (8x8 pixels, no download) on all devices that there are, in rows and
columns: a batch is shared out along one axis, weights and VSGD's state along both. Where there is a CPU only, it counts as 8:

    pip install '.[optax]' orbax-checkpoint scikit-learn
    python examples/jax_sharded.py

It begins with the last whole checkpoint in `--checkpoints`, where there is one. To see it, let it kill itself in mid-training
and start it again. The last line, a digest of all parameters and of the optimizer's state, is that of a run without a break,
for the batches depend on the seed and on the step only:

    python examples/jax_sharded.py --die-at 90
    python examples/jax_sharded.py

It resumes on a mesh of another shape too (`--columns 4`). Sums are then taken in another order, and last bits differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from vsgd.optax import vsgd

BATCH_SIZE = 64  # of all devices together
SHAPES = {"in": (64, 128), "bias": (128,), "hidden": (128, 64), "out": (64, 10)}
SPECS = {"in": P("data", "model"), "bias": P("model"), "hidden": P("model", "data"), "out": P("data")}

solver = vsgd(0.01)


class Training(NamedTuple):
    """All that a checkpoint holds, but for the step, which is its name."""

    params: dict[str, jax.Array]
    state: Any


def start() -> Training:
    """Weights by He's rule, biases of zero, and the state of the optimizer."""
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    params = {
        name: jax.random.normal(key, shape) * jnp.sqrt(2 / shape[0]) if len(shape) == 2 else jnp.zeros(shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    return Training(params, solver.init(params))


def usable_devices() -> list[jax.Device]:
    """All, or as many as can share each dimension of the weights."""
    return jax.devices()[: 1 << (min(jax.device_count(), 64).bit_length() - 1)]


def make_mesh(devices: list[jax.Device], columns: int) -> Mesh:
    """Devices in rows and columns; the axes have the compiler decide how arrays between are sharded."""
    shape = (len(devices) // columns, columns)
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def shardings_on(mesh: Mesh) -> Training:
    """Where all lies: each array of the state as its parameter does, and the count of steps on all devices."""
    params = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    state = optax.tree_utils.tree_map_params(
        solver,
        lambda _, sharding: sharding,
        jax.eval_shape(start).state,
        params,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    return Training(params, state)


def loss(params: dict[str, jax.Array], images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of a batch."""
    hidden = jax.nn.gelu(jax.nn.gelu(images @ params["in"] + params["bias"]) @ params["hidden"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], labels).mean()


def make_step(shardings: Training) -> Any:
    """The compiled step, in which the compiler puts what the devices must tell each other."""

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(training: Training, images: jax.Array, labels: jax.Array) -> tuple[Training, jax.Array]:
        value, grads = jax.value_and_grad(loss)(training.params, images, labels)
        updates, state = solver.update(grads, training.state, training.params)
        return Training(optax.apply_updates(training.params, updates), state), value

    return step


def load_data() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 digits, pixels scaled to [-1, 1], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return np.float32(pixels / 8 - 1), np.int32(labels)


def batch_of(step: int, examples: int, seed: int) -> np.ndarray:
    """Indices of a step's mini-batch: a new order in each epoch, its incomplete last batch dropped.

    Of the seed and the step alone, so that a resumed run sees what it would have seen.
    """
    epoch, place = divmod(step, examples // BATCH_SIZE)
    order = np.random.default_rng((seed, epoch)).permutation(examples)
    return order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]


def resume(manager: ocp.CheckpointManager, shardings: Training) -> tuple[Training, int]:
    """What the last whole checkpoint holds, or else a new training, each array straight into its place; and the next step."""
    last = manager.latest_step()
    if last is None:
        return jax.jit(start, out_shardings=shardings)(), 0
    # Without it orbax would return dicts, and arrays that lie as they did when they were saved.
    target = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        jax.eval_shape(start),
        shardings,
    )
    training = manager.restore(last, args=ocp.args.StandardRestore(target))
    print(f"resumed at step {last}", flush=True)
    return training, last


def train(manager: ocp.CheckpointManager, mesh: Mesh, arguments: argparse.Namespace) -> Training:
    """Train up to the last step, with a checkpoint every so many."""
    shardings = shardings_on(mesh)
    training, done = resume(manager, shardings)
    take_step, data = make_step(shardings), load_data()
    for step in range(done, arguments.steps):
        if step == arguments.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = batch_of(step, len(data[0]), arguments.seed)
        images, labels = jax.device_put([array[batch] for array in data], NamedSharding(mesh, P("data")))
        training, value = take_step(training, images, labels)
        if (step + 1) % arguments.every == 0 or step + 1 == arguments.steps:
            manager.save(step + 1, args=ocp.args.StandardSave(training))
            print(f"step {step + 1}: loss {value:.4f}, saved", flush=True)
    return training


def digest(training: Training) -> str:
    """Of every bit of the parameters and of the optimizer's state."""
    result = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(training):
        result.update(jax.tree_util.keystr(path).encode() + np.asarray(array).tobytes())
    return result.hexdigest()


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="VSGD on a mesh of devices, with checkpoints.")
    parser.add_argument("--steps", type=int, default=200, help="mini-batches (default: %(default)s)")
    parser.add_argument("--every", type=int, default=40, help="steps between two checkpoints (default: %(default)s)")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="where (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=2, help="devices that share a row of the mesh (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=8, help="devices, where there is a CPU only (default: %(default)s)")
    parser.add_argument("--die-at", type=int, metavar="STEP", help="kill itself there")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.every, arguments.columns, arguments.cpus) < 1:
        parser.error("--steps, --every, --columns and --cpus must be at least 1")
    jax.config.update("jax_num_cpu_devices", arguments.cpus)
    devices = usable_devices()
    if len(devices) % arguments.columns:
        parser.error(f"--columns must divide {len(devices)}, the number of devices")
    mesh = make_mesh(devices, arguments.columns)
    # Saved before the next step: in the background it would cost so small a model more than it gains.
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(arguments.checkpoints.absolute(), options=options) as manager:
        training = train(manager, mesh, arguments)
    print(f"ended at step {arguments.steps}: {digest(training)}")


if __name__ == "__main__":
    main()
