"""Keras models trained on several devices, by each backend's own way, end where one device ends; and what Keras refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("keras") is None:
    pytest.skip("Keras is not installed", allow_module_level=True)

from scaling import keras_processes
from scaling.ranks import Ranks

On = Callable[..., Any]
Agreed = Callable[..., None]

EIGHT, TWO, RANKS = "keras-jax, 8 CPU devices", "keras-tensorflow, 2 CPU devices", "keras-torch, 2 processes"
# Ten times and twice how far one device strays from itself where the examples of a batch come in another order: 4e-6 and 0.13.
# For so are the sums over devices: in another order, and rounded to bfloat16 where the layers compute in it.
BOUNDS = {"VSGD": 4e-5, "ConstantVSGD": 4e-5, "average of the weights": 4e-5, "mixed precision": 0.25}
COMPACT = "bfloat16 state and variables"
distributions = pytest.mark.parametrize("how", ["DataParallel", "ModelParallel"])
steps = pytest.mark.parametrize("case", ["VSGD", "ConstantVSGD", COMPACT])

WHOLE = {
    "first/kernel": (6, 8),
    "first/bias": (8,),
    "norm/gamma": (8,),
    "norm/beta": (8,),
    "second/kernel": (8, 2),
    "second/bias": (2,),
}
SHARDED = {**WHOLE, "first/kernel": (6, 4), "first/bias": (4,), "second/kernel": (4, 2)}


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[On]:
    """`on(backend, "module.function", *args)`: what each process of the backend returns, started when it is first asked."""
    pools: dict[tuple[str, str], Ranks] = {}

    def run(backend: str, function: str, *args: Any, device: str = "cpu") -> Any:
        if find_spec(backend) is None:
            pytest.skip(f"{backend} is not installed")
        if (backend, device) not in pools:
            pools[backend, device] = keras_processes.pool(backend, device, tmp_path_factory.mktemp(backend))
        module, name = function.split(".")
        return pools[backend, device].run(keras_processes.call, module, name, *args)

    yield run
    for pool in pools.values():
        pool.stop()


# --- JAX: keras.distribution over 8 devices. ---


@distributions
@pytest.mark.parametrize("case", ["VSGD", "ConstantVSGD", "mixed precision"])
def test_a_training_on_eight_devices_ends_where_one_ends(case: str, how: str, on: On, agreed: Agreed) -> None:
    (strayed,) = on("jax", "keras_distributed.strayed", case, how)
    agreed(f"keras.distribution.{how}, {case}", EIGHT, strayed, BOUNDS[case])


@distributions
def test_state_stays_where_its_variable_is(how: str, on: On) -> None:
    (layouts,) = on("jax", "keras_on_jax.layouts", how)
    assert layouts == {name: (shape, 3) for name, shape in (SHARDED if how == "ModelParallel" else WHOLE).items()}


@pytest.mark.parametrize(
    ("case", "how"),
    [("VSGD", "DataParallel"), ("VSGD", "ModelParallel"), ("ConstantVSGD", "ModelParallel"), (COMPACT, "ModelParallel")],
)
def test_a_step_on_eight_devices_is_that_of_one_and_communicates_nothing(case: str, how: str, on: On, agreed: Agreed) -> None:
    ((strayed, scale, communication),) = on("jax", "keras_on_jax.equal_gradients", case, how)
    assert communication == []
    agreed(f"keras.distribution.{how}, equal gradients, {case}", EIGHT, strayed)
    # The sums over all elements are summed in another order.
    agreed(f"keras.distribution.{how}, noise_scale, {case}", EIGHT, scale, 1e-6)


@distributions
def test_a_training_step_communicates_no_more_than_sgd(how: str, on: On) -> None:
    ((ours, sgd),) = on("jax", "keras_on_jax.communication", how)
    assert "all-reduce" in ours
    assert ours == sgd


# --- TensorFlow: MirroredStrategy. ---


@pytest.mark.parametrize("case", ["average of the weights", "mixed precision"])
def test_a_mirrored_training_ends_where_one_device_ends_with_equal_replicas(case: str, on: On, agreed: Agreed) -> None:
    ((strayed, copies),) = on("tensorflow", "keras_on_tensorflow.mirrored", case)
    assert copies == ({2}, {1})
    agreed(f"MirroredStrategy, {case}", TWO, strayed, BOUNDS[case])


@steps
def test_a_mirrored_step_is_that_of_one_device(case: str, on: On, agreed: Agreed) -> None:
    ((strayed, scale, copies),) = on("tensorflow", "keras_on_tensorflow.equal_gradients", case)
    assert copies == ({2}, {1})
    agreed(f"MirroredStrategy, equal gradients, {case}", TWO, strayed)
    agreed(f"MirroredStrategy, noise_scale, {case}", TWO, scale)


@pytest.mark.parametrize("limit", [{"clipnorm": 0.1}, {"global_clipnorm": 0.2}], ids=lambda limit: next(iter(limit)))
def test_keras_clips_what_each_replica_adds_to_the_gradient(limit: dict[str, float], on: On, agreed: Agreed) -> None:
    (strayed,) = on("tensorflow", "keras_on_tensorflow.clipped", limit)
    agreed(f"MirroredStrategy, {next(iter(limit))}", TWO, strayed, BOUNDS["VSGD"])


def test_what_does_not_run_under_a_strategy_says_so(on: On) -> None:
    (said,) = on("tensorflow", "keras_on_tensorflow.refused")
    assert "Trying to access resource" in said["jit_compile"]
    for what in ("gradient accumulation", "overwriting by the average"):
        assert "`merge_call` called while defining a new graph" in said[what]
    # State that is on one device would be stepped once for each.
    assert 'Need to be inside "with strategy.scope()"' in said["built outside"]
    assert "Mixing different tf.distribute.Strategy objects" in said["made outside"]


# --- torch: DDP around the model. ---


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_keras_own_distribution_is_accepted_and_does_nothing_but_on_jax(backend: str, on: On, agreed: Agreed) -> None:
    found = on(backend, "keras_distributed.undistributed")[0]
    if found is None:
        pytest.skip("this Keras does not accept it")
    strayed, devices = found
    assert devices == 1
    agreed("keras.distribution.DataParallel, which distributes nothing", f"keras-{backend}", strayed)


@pytest.mark.parametrize("case", [*BOUNDS, COMPACT])
def test_ddp_around_a_keras_model(case: str, on: On, agreed: Agreed) -> None:
    (strayed, one), (_, other) = on("torch", "keras_on_torch.ddp", case)
    assert one == other
    agreed(f"DDP, vsgd.keras, {case}", RANKS, strayed)


@steps
def test_ddp_around_a_keras_model_stepped_as_torch_does(case: str, on: On, agreed: Agreed) -> None:
    (strayed, one), (_, other) = on("torch", "keras_on_torch.ddp_as_torch", case)
    assert one == other
    agreed(f"DDP, vsgd.torch, {case}", RANKS, strayed)


# --- Checkpoints: saved on one, loaded on another. ---

LOADS = [
    ("jax ModelParallel", "jax DataParallel"),
    ("jax ModelParallel", "jax alone"),
    ("jax ModelParallel", "tensorflow MirroredStrategy"),
    ("jax ModelParallel", "torch alone"),
    ("jax alone", "jax ModelParallel"),
    ("tensorflow MirroredStrategy", "tensorflow alone"),
    ("tensorflow MirroredStrategy", "jax ModelParallel"),
    ("tensorflow alone", "tensorflow MirroredStrategy"),
    ("torch DDP", "torch alone"),
    ("torch DDP", "jax ModelParallel"),
]


@pytest.fixture(scope="module")
def saved(on: On, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Where a model in training lies that was saved so; each is trained once."""
    folder = tmp_path_factory.mktemp("saved")

    @functools.cache
    def path_of(saver: str) -> str:
        backend, how = saver.split()
        path = str(folder / saver.replace(" ", "-"))
        if how == "DDP":
            on(backend, "keras_on_torch.save_by_ddp", "VSGD", path)
        else:
            on(backend, "keras_distributed.save", "VSGD", how, path)
        return path

    return path_of


@pytest.mark.parametrize(("saver", "reader"), LOADS, ids=[" to ".join(each) for each in LOADS])
def test_saved_on_one_and_continued_on_another(
    saver: str, reader: str, on: On, saved: Callable[[str], str], agreed: Agreed
) -> None:
    backend, how = reader.split()
    loaded, continued = on(backend, "keras_distributed.load", how, saved(saver))[0]
    agreed(f"saved on {saver}, loaded", f"keras, {reader}", loaded)
    agreed(f"saved on {saver}, continued", f"keras, {reader}", continued, BOUNDS["VSGD"])


def test_what_is_loaded_is_sharded_anew(on: On, saved: Callable[[str], str]) -> None:
    (layouts,) = on("jax", "keras_on_jax.layouts", "ModelParallel", saved("jax alone"))
    assert layouts == {name: (shape, 3) for name, shape in SHARDED.items()}


# --- GPUs: all that there are. ---


@pytest.fixture
def on_gpus(on: On) -> On:
    """`on_gpus(backend, "module.function", *args)`: how many GPUs there are in words, and what each process returns."""

    def run(backend: str, function: str, *args: Any) -> tuple[str, list[Any]]:
        number = sum(on(backend, "keras_distributed.gpus", device="gpu"))
        if number == 0:
            pytest.skip(f"no GPU that {backend} can use")
        return f"keras-{backend}, {number} GPUs", on(backend, function, *args, device="gpu")

    return run


@pytest.mark.gpu
@distributions
@pytest.mark.parametrize("case", ["VSGD", "mixed precision"])
def test_a_training_on_gpus_ends_where_one_ends(case: str, how: str, on_gpus: On, agreed: Agreed) -> None:
    where, (strayed,) = on_gpus("jax", "keras_distributed.strayed", case, how)
    agreed(f"keras.distribution.{how}, {case}", where, strayed, BOUNDS[case])


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["average of the weights", "mixed precision"])
def test_a_training_mirrored_on_gpus_ends_where_one_ends(case: str, on_gpus: On, agreed: Agreed) -> None:
    where, ((strayed, (_, values)),) = on_gpus("tensorflow", "keras_on_tensorflow.mirrored", case)
    assert values == {1}
    agreed(f"MirroredStrategy, {case}", where, strayed, BOUNDS[case])


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["VSGD", "mixed precision"])
def test_ddp_around_a_keras_model_on_gpus(case: str, on_gpus: On, agreed: Agreed) -> None:
    where, ranks = on_gpus("torch", "keras_on_torch.ddp", case)
    assert all(replica == ranks[0][1] for _, replica in ranks)
    agreed(f"DDP, vsgd.keras, {case}", where, max(strayed for strayed, _ in ranks), BOUNDS[case])
