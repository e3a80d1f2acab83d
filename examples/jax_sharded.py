"""Train with VSGD on a mesh of devices, save orbax checkpoints, and resume from the last one after a kill.

    pip install '.[optax]' orbax-checkpoint scikit-learn tqdm
    python examples/jax_sharded.py --die-at 90
    python examples/jax_sharded.py

The second run ends with the same bits as an uninterrupted one, because a batch depends only on its step.
"""

import argparse
import signal
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from tqdm import tqdm

from vsgd.optax import constant_vsgd

STEPS, EVERY = 200, 40  # mini-batches in all, and between two checkpoints
AXES = {"in": ("data", "model"), "out": ("model", "data")}
solver, cross_entropy = constant_vsgd(0.008), optax.softmax_cross_entropy_with_integer_labels


def init_training() -> tuple:
    """Make the weights and the optimizer's state."""
    first, second = jax.random.split(jax.random.key(0))
    params = {"in": jax.random.normal(first, (64, 128)) / 8, "out": jax.random.normal(second, (128, 16)) / 11}
    return params, solver.init(params)


def make_shardings(mesh: Mesh) -> tuple:
    """Shard each array of the state like its parameter, and replicate the step count on all devices."""
    params = {name: NamedSharding(mesh, PartitionSpec(*axes)) for name, axes in AXES.items()}
    state, count = jax.eval_shape(init_training)[1], NamedSharding(mesh, PartitionSpec())
    return params, optax.tree_map_params(solver, lambda _, place: place, state, params, transform_non_params=lambda _: count)


def resume(manager: ocp.CheckpointManager, init: jax.stages.Wrapped) -> tuple[tuple, int]:
    """Load the last complete checkpoint or start anew, sharded like `init`'s results; return the training and its step."""
    if (last := manager.latest_step()) is None:
        return init(), 0
    return manager.restore(last, args=ocp.args.StandardRestore(init.eval_shape())), last


def take_step(training: tuple, images: jax.Array, labels: jax.Array) -> tuple[tuple, jax.Array]:
    """Take a step; the compiler inserts the communication between devices."""
    params, state = training
    loss, grads = jax.value_and_grad(lambda p: cross_entropy(jax.nn.gelu(images @ p["in"]) @ p["out"], labels).mean())(params)
    updates, state = solver.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss


parser = argparse.ArgumentParser(description="VSGD on a mesh of devices, with checkpoints.")
parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder (default: %(default)s)")
parser.add_argument("--cpus", type=int, default=8, help="virtual CPU devices without an accelerator (default: %(default)s)")
parser.add_argument("--die-at", type=int, metavar="STEP", help="kill the process at this step")
arguments = parser.parse_args()
jax.config.update("jax_num_cpu_devices", arguments.cpus)
mesh = jax.make_mesh((jax.device_count() // 2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
shardings = make_shardings(mesh)
take_step = jax.jit(take_step, donate_argnums=0, out_shardings=(shardings, None))
pixels, labels = load_digits(return_X_y=True)
options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
with ocp.CheckpointManager(arguments.checkpoints.absolute(), options=options) as manager:
    training, first = resume(manager, jax.jit(init_training, out_shardings=shardings))
    for step in tqdm(range(first, STEPS), initial=first, total=STEPS, unit="step"):
        if step == arguments.die_at:
            signal.raise_signal(signal.SIGKILL)
        chosen = np.random.default_rng(step).integers(len(labels), size=64)
        batch = jax.device_put((np.float32(pixels[chosen] / 8 - 1), labels[chosen]), NamedSharding(mesh, PartitionSpec("data")))
        training, loss = take_step(training, *batch)
        if (step + 1) % EVERY == 0:
            manager.save(step + 1, args=ocp.args.StandardSave(training))
            tqdm.write(f"step {step + 1}: loss {loss:.4f}, saved")
