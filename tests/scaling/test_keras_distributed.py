"""Test that each backend's distributed Keras training equals training on one device, and what Keras rejects."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from scaling.ranks import Agreed, On

if find_spec("keras") is None:
    pytest.skip("Keras is not installed", allow_module_level=True)


WHERE = {
    "keras-jax cpu": "keras-jax, 8 CPU devices",
    "keras-tensorflow cpu": "keras-tensorflow, 2 CPU devices",
    "keras-torch cpu": "keras-torch, 2 processes",
}
# One device deviates from itself by 4e-6, and by 0.13 in mixed precision, if the examples of a batch come in another order. The
# bounds are ten times and twice that, because sums over devices are also in another order, and rounded to bfloat16 if the
# layers compute in it.
BOUNDS = {"VSGD": 4e-5, "ConstantVSGD": 4e-5, "average of the weights": 4e-5, "calibrated": 4e-5, "mixed precision": 0.25}
COMPACT = "bfloat16 state and variables"
SHARDED = {"DataParallel": [], "ModelParallel": ["first/kernel", "first/bias", "second/kernel"]}

TRAININGS = [
    ("jax", "DataParallel", "VSGD"),
    ("jax", "DataParallel", "mixed precision"),
    ("jax", "ModelParallel", "ConstantVSGD"),
    ("jax", "ModelParallel", "mixed precision"),
    ("jax", "ModelParallel", "calibrated"),
    ("tensorflow", "MirroredStrategy", "average of the weights"),
    ("tensorflow", "MirroredStrategy", "mixed precision"),
    ("tensorflow", "MirroredStrategy", "calibrated"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpus", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("backend", "how", "case"), TRAININGS)
def test_a_training_on_several_devices_ends_where_one_ends(
    backend: str, how: str, case: str, device: str, on: On, agreed: Agreed
) -> None:
    pool = f"keras-{backend} {device}"
    (strayed,) = on(pool, "keras_distributed.strayed", case, how)
    agreed(f"{how}, {case}", WHERE.get(pool, pool), strayed, BOUNDS[case])


@pytest.mark.parametrize(
    ("case", "how"), [("VSGD", "DataParallel"), ("ConstantVSGD", "ModelParallel"), (COMPACT, "ModelParallel")]
)
def test_a_step_on_eight_devices_is_that_of_one_and_communicates_nothing(case: str, how: str, on: On, agreed: Agreed) -> None:
    ((strayed, scale),) = on("keras-jax cpu", "keras_on_jax.equal_gradients", case, how)
    agreed(f"{how}, equal gradients, {case}", WHERE["keras-jax cpu"], strayed)
    # The sums over all elements are in another order.
    agreed(f"{how}, noise_scale, {case}", WHERE["keras-jax cpu"], scale, 1e-6)


@pytest.mark.parametrize("how", SHARDED)
def test_state_stays_where_its_variable_is(how: str, on: On) -> None:
    assert on("keras-jax cpu", "keras_on_jax.sharded", how) == [SHARDED[how]]


@pytest.mark.parametrize("case", ["VSGD", "ConstantVSGD", COMPACT])
def test_a_mirrored_step_is_that_of_one_device(case: str, on: On, agreed: Agreed) -> None:
    ((strayed, scale),) = on("keras-tensorflow cpu", "keras_on_tensorflow.equal_gradients", case)
    agreed(f"MirroredStrategy, equal gradients, {case}", WHERE["keras-tensorflow cpu"], strayed)
    agreed(f"MirroredStrategy, noise_scale, {case}", WHERE["keras-tensorflow cpu"], scale)


def test_what_is_made_outside_a_strategy_is_refused(on: On) -> None:
    on("keras-tensorflow cpu", "keras_on_tensorflow.refuse_what_is_made_outside")


DDP = [
    *(("cpu", "vsgd.keras", case) for case in (*BOUNDS, COMPACT)),
    ("cpu", "vsgd.torch", "ConstantVSGD"),
    ("cpu", "vsgd.torch", COMPACT),
    *(pytest.param("gpus", "vsgd.keras", case, marks=pytest.mark.gpu) for case in ("VSGD", "mixed precision")),
]


@pytest.mark.parametrize(("device", "optimizer", "case"), DDP)
def test_ddp_around_a_keras_model(device: str, optimizer: str, case: str, on: On, agreed: Agreed) -> None:
    pool = f"keras-torch {device}"
    ranks = on(pool, "keras_on_torch.ddp", case, optimizer)
    assert all(replica == ranks[0][1] for _, replica in ranks)
    bound = 0.0 if device == "cpu" else BOUNDS[case]
    agreed(f"DDP, {optimizer}, {case}", WHERE.get(pool, pool), max(strayed for strayed, _ in ranks), bound)


# If another backend's last digit changes a rounding of the state, the rest differs by a fraction of 1/256.
STATE = "bfloat16 state"
CONTINUED = {"VSGD": BOUNDS["VSGD"], STATE: 2e-2}
#: Each setup saves, and each loads what another saved.
LOADS = [
    ("jax ModelParallel", "tensorflow MirroredStrategy", "VSGD"),
    ("jax ModelParallel", "jax alone", "VSGD"),
    ("tensorflow MirroredStrategy", "torch alone", "VSGD"),
    ("torch DDP", "jax ModelParallel", "VSGD"),
    ("jax alone", "jax DataParallel", "VSGD"),
    ("tensorflow alone", "jax alone", STATE),
    ("jax alone", "torch alone", STATE),
    ("torch alone", "tensorflow alone", STATE),
]


@pytest.mark.parametrize(("saver", "reader", "case"), LOADS, ids=[" to ".join(each) for each in LOADS])
def test_saved_on_one_and_continued_on_another(
    saver: str, reader: str, case: str, on: On, agreed: Agreed, tmp_path: Path
) -> None:
    path = str(tmp_path / "model")
    if saver == "torch DDP":
        on("keras-torch cpu", "keras_on_torch.save", path, case)
    else:
        backend, how = saver.split()
        on(f"keras-{backend} cpu", "keras_distributed.save", how, path, case)
    backend, how = reader.split()
    loaded, continued = on(f"keras-{backend} cpu", "keras_distributed.load", how, path)[0]
    what = f"saved on {saver}{f', {case}' if case == STATE else ''}"
    agreed(f"{what}, loaded", f"keras, {reader}", loaded)
    agreed(f"{what}, continued", f"keras, {reader}", continued, CONTINUED[case])
    if how in SHARDED:
        assert on("keras-jax cpu", "keras_on_jax.sharded", how, path) == [SHARDED[how]]
