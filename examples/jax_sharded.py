"""Train with VSGD on a mesh of devices, save orbax checkpoints, and resume after a kill.

The script trains a small network on scikit-learn's handwritten digits (8x8 pixels, no download). It arranges all devices in
rows and columns. One axis splits the batch, both axes split the weights and VSGD's state. A machine without accelerators runs
8 virtual CPU devices:

    pip install '.[optax]' orbax-checkpoint scikit-learn
    python examples/jax_sharded.py

A run resumes from the last complete checkpoint in `--checkpoints`, if there is one. To try it, let the script kill itself
during training, then start it again. The last line is a digest of all parameters and of the optimizer's state. It equals the
digest of an uninterrupted run because the batches depend only on the seed and the step:

    python examples/jax_sharded.py --die-at 90
    python examples/jax_sharded.py

A run also resumes on a mesh of another shape (`--columns 4`). The order of sums then changes, and last bits differ.
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
    """The contents of a checkpoint; the checkpoint's name is its step."""

    params: dict[str, jax.Array]
    state: Any


def init_training() -> Training:
    """Make weights by He's rule, zero biases, and the optimizer's state."""
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    params = {
        name: jax.random.normal(key, shape) * jnp.sqrt(2 / shape[0]) if len(shape) == 2 else jnp.zeros(shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    return Training(params, solver.init(params))


def list_devices() -> list[jax.Device]:
    """List the devices to use: the largest power of two up to 64, so that it divides every sharded dimension."""
    return jax.devices()[: 1 << (min(jax.device_count(), 64).bit_length() - 1)]


def make_mesh(devices: list[jax.Device], columns: int) -> Mesh:
    """Arrange devices in rows and columns; on Auto axes the compiler shards intermediate arrays."""
    shape = (len(devices) // columns, columns)
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_shardings(mesh: Mesh) -> Training:
    """Shard each array of the state like its parameter, and replicate the step count on all devices."""
    params = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    state = optax.tree_utils.tree_map_params(
        solver,
        lambda _, sharding: sharding,
        jax.eval_shape(init_training).state,
        params,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    return Training(params, state)


def loss(params: dict[str, jax.Array], images: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the mean cross-entropy of a batch."""
    hidden = jax.nn.gelu(jax.nn.gelu(images @ params["in"] + params["bias"]) @ params["hidden"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], labels).mean()


def make_step(shardings: Training) -> Any:
    """Compile the step; the compiler inserts the communication between devices."""

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(training: Training, images: jax.Array, labels: jax.Array) -> tuple[Training, jax.Array]:
        value, grads = jax.value_and_grad(loss)(training.params, images, labels)
        updates, state = solver.update(grads, training.state, training.params)
        return Training(optax.apply_updates(training.params, updates), state), value

    return step


def load_data() -> tuple[np.ndarray, np.ndarray]:
    """Load the 1797 digits with pixels scaled to [-1, 1], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return np.float32(pixels / 8 - 1), np.int32(labels)


def select_batch(step: int, examples: int, seed: int) -> np.ndarray:
    """Return the indices of a step's mini-batch: a new order in each epoch, without its incomplete last batch.

    The indices depend only on the seed and the step, so a resumed run uses the same batches as an uninterrupted one.
    """
    epoch, place = divmod(step, examples // BATCH_SIZE)
    order = np.random.default_rng((seed, epoch)).permutation(examples)
    return order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]


def resume(manager: ocp.CheckpointManager, shardings: Training) -> tuple[Training, int]:
    """Load the last complete checkpoint or start anew, with every array sharded; return the training and the next step."""
    last = manager.latest_step()
    if last is None:
        return jax.jit(init_training, out_shardings=shardings)(), 0
    # Without a target orbax returns dicts, and arrays with the shardings of the saved ones.
    target = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        jax.eval_shape(init_training),
        shardings,
    )
    training = manager.restore(last, args=ocp.args.StandardRestore(target))
    print(f"resumed at step {last}", flush=True)
    return training, last


def train(manager: ocp.CheckpointManager, mesh: Mesh, arguments: argparse.Namespace) -> Training:
    """Train up to the last step and save a checkpoint every `--every` steps."""
    shardings = make_shardings(mesh)
    training, done = resume(manager, shardings)
    take_step, data = make_step(shardings), load_data()
    for step in range(done, arguments.steps):
        if step == arguments.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = select_batch(step, len(data[0]), arguments.seed)
        images, labels = jax.device_put([array[batch] for array in data], NamedSharding(mesh, P("data")))
        training, value = take_step(training, images, labels)
        if (step + 1) % arguments.every == 0 or step + 1 == arguments.steps:
            manager.save(step + 1, args=ocp.args.StandardSave(training))
            print(f"step {step + 1}: loss {value:.4f}, saved", flush=True)
    return training


def compute_digest(training: Training) -> str:
    """Hash every bit of the parameters and of the optimizer's state."""
    result = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(training):
        result.update(jax.tree_util.keystr(path).encode() + np.asarray(array).tobytes())
    return result.hexdigest()


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="VSGD on a mesh of devices, with checkpoints.")
    parser.add_argument("--steps", type=int, default=200, help="mini-batches (default: %(default)s)")
    parser.add_argument("--every", type=int, default=40, help="steps between two checkpoints (default: %(default)s)")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data's order (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=2, help="devices that share a row of the mesh (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=8, help="virtual CPU devices without an accelerator (default: %(default)s)")
    parser.add_argument("--die-at", type=int, metavar="STEP", help="kill the process at this step")
    arguments = parser.parse_args()
    for option in ("steps", "every", "columns", "cpus"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option} is {getattr(arguments, option)}, but must be at least 1")
    jax.config.update("jax_num_cpu_devices", arguments.cpus)
    devices = list_devices()
    if len(devices) % arguments.columns:
        parser.error(f"--columns is {arguments.columns}, but must divide {len(devices)}, the number of devices")
    mesh = make_mesh(devices, arguments.columns)
    # Save synchronously: a background thread costs more than it gains on so small a model.
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(arguments.checkpoints.absolute(), options=options) as manager:
        training = train(manager, mesh, arguments)
    print(f"ended at step {arguments.steps}: {compute_digest(training)}")


if __name__ == "__main__":
    main()
