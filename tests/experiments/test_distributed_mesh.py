"""What the axes of the mesh divide, in one process with two devices."""

import re
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments import models
from experiments.settings.checks import from_config_dict
from experiments.settings.config import MeshConfig
from experiments.settings.errors import ExperimentError
from experiments.train.feed import Feed
from experiments.train.mesh import batch_sharding, create_mesh, on_host, place, state_shardings
from experiments.train.prepare import prepare

NETWORKS = {
    "test_mlp": {"hidden": (64,)},
    "test_bn": {"convolutions": (models.Convolution(4, 4, 2, 1),), "batch_norm": True},
}
COLLECTIVE = (
    r"= .* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    for name, fields in NETWORKS.items():
        monkeypatch.setitem(models.MODELS, name, fields)


def _prepared(method="crown-ibp", model="test_mlp", mesh=None, **groups):
    settings = {
        "data": {"name": "digits"},
        "model": {"name": model},
        "train": {"epochs": 1, "batch_size": 32},
        "optim": {"name": "sgd", "lr": 0.02},
        "robust": {"method": method, "eps_train": 0.05, "ramp_epochs": 0.0, "beta": (1.0, 0.5)},
        "mesh": mesh or {},
    }
    return prepare(from_config_dict(settings | groups))


def _trained(prepared, steps=3):
    """The state after some steps, and the metrics of the last."""
    state = prepared.initial_state(0)
    feed = Feed(prepared.splits.train, 32, (0,), batch_sharding(prepared.mesh))
    step_of = prepared.train_steps((0,))
    for step in range(steps):
        state, metrics = step_of[prepared.phases[step]](state, *feed(step))
    return state, metrics


def _program(prepared):
    """The compiled step of the phase that is due first, as text."""
    images, labels = (
        jax.ShapeDtypeStruct(
            (32, *array.shape[1:]), array.dtype, sharding=batch_sharding(prepared.mesh)
        )
        for array in prepared.splits.train
    )
    step = prepared.train_steps((0,))[prepared.phases[0]]
    return step.lower(prepared.initial_state(0), images, labels).compile().as_text()


@pytest.mark.parametrize(
    ("method", "mesh", "groups"),
    [
        ("crown-ibp", {"data": 1, "fsdp": 2}, {}),
        ("crown-ibp", {"spec": 2}, {}),
        # The regularizers read the relaxation of every row.
        ("cap", {"spec": 2}, {"regularizers": {"gap": 0.1, "slack": 0.1}}),
    ],
)
@pytest.mark.slow
def test_every_mesh_trains_the_same(method, mesh, groups):
    expected, metrics = _trained(_prepared(method, mesh={"data": 1}, **groups))
    prepared = _prepared(method, mesh=mesh, **groups)
    result, found_metrics = _trained(prepared)
    kernel = result["params"]["Dense_0"]["kernel"]
    assert len(kernel.sharding.device_set) == 2
    part = (64 // mesh.get("fsdp", 1), 64)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {part}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        on_host(result["params"]),
        on_host(expected["params"]),
    )
    for name, value in metrics.items():
        np.testing.assert_allclose(found_metrics[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("model", "count"), [("test_mlp", 1), ("test_bn", 3)])
@pytest.mark.sampled(3)
def test_a_data_parallel_step_sums_gradients_once_and_nothing_else(model, count):
    # Batch normalisation sums its statistics over the batch, and their gradients.
    result = Counter(re.findall(COLLECTIVE, _program(_prepared(model=model))))
    assert result == {"all-reduce": count}


@pytest.mark.usefixtures("optimized")
@pytest.mark.slow
def test_a_step_gathers_every_divided_parameter_once():
    result = Counter(re.findall(COLLECTIVE, _program(_prepared(mesh={"fsdp": 2, "data": 1}))))
    assert result["all-gather"] == 1  # the kernel of the first layer; the others are small
    assert set(result) <= {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.usefixtures("optimized")
def test_rows_are_divided_over_spec():
    def rows_of_hidden_units(**mesh):
        text = _program(_prepared(mesh=mesh))
        return {int(rows) for rows in re.findall(r"f32\[32,(\d+),64\]|$", text) if rows}

    # 9 margins; 5 for each of two devices.
    assert 9 in rows_of_hidden_units(data=1)
    divided = rows_of_hidden_units(spec=2)
    assert 5 in divided
    assert not divided & {9, 10}


def test_the_feed_needs_no_collective():
    prepared = _prepared()
    feed = Feed(prepared.splits.train, 32, (0,), batch_sharding(prepared.mesh))
    feed(0)
    arguments = (*feed._resident, feed._order, np.int32(0))
    assert not re.findall(COLLECTIVE, feed._gather.lower(*arguments).compile().as_text())


def test_large_leaves_are_divided_along_their_longest_axis():
    mesh = create_mesh(MeshConfig(data=1, fsdp=2))
    shapes = {"kernel": (3, 512), "image": (4, 4, 16, 8), "bias": (10,), "odd": (45, 45)}
    leaves = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    state = {"params": leaves, "opt_state": {"mu": leaves}, "batch_stats": leaves}
    result = state_shardings(state, mesh)
    specs = {name: sharding.spec for name, sharding in result["params"].items()}
    divided = {"kernel": PartitionSpec(None, "fsdp"), "image": PartitionSpec(None, None, "fsdp")}
    assert specs == divided | {"bias": PartitionSpec(), "odd": PartitionSpec()}
    assert result["opt_state"]["mu"] == result["params"]
    assert result["batch_stats"]["kernel"].spec == PartitionSpec()
    together = {"params": {"kernel": jax.ShapeDtypeStruct((2, *shapes["kernel"]), np.float32)}}
    spec = state_shardings(together, mesh, together=True)["params"]["kernel"].spec
    assert spec == PartitionSpec(None, None, "fsdp")


def test_whole_arrays_come_back_to_the_host():
    mesh = create_mesh(MeshConfig(data=1, fsdp=2))
    value = np.arange(4.0, dtype=np.float32)
    placed = place(value, jax.NamedSharding(mesh, PartitionSpec("fsdp")))
    assert placed.addressable_shards[0].data.shape == (2,)
    np.testing.assert_array_equal(on_host({"a": placed})["a"], value)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 3}, "data=3 x fsdp=1 x spec=1 needs 3 devices, and 3 must divide the 2"),
        ({"fsdp": 4}, "needs a multiple of 4 devices"),
        ({"data": -1, "spec": -1}, "at most one axis can be -1, got data and spec"),
        ({"fsdp": 0}, r"config\.mesh\.fsdp must be >= 1, or -1"),
        ({"data": -2}, r"config\.mesh\.data must be >= 1, or -1"),
    ],
)
def test_impossible_meshes_are_refused(mesh, message):
    with pytest.raises(ExperimentError, match=message):
        _prepared(mesh=mesh)


def test_processes_without_a_device_are_refused():
    devices = [SimpleNamespace(process_index=index) for index in (0, 0, 1, 1)]
    with pytest.raises(ExperimentError, match="has 2 devices, but the processes have 4"):
        create_mesh(MeshConfig(data=2), devices)


@pytest.mark.parametrize(
    ("method", "relaxation"),
    [("ibp", {}), ("one-step", {}), ("crown-ibp", {"fused": True}), ("cap", {"projections": 4})],
)
def test_methods_without_rows_to_divide_refuse_spec(method, relaxation):
    with pytest.raises(ExperimentError, match=r"config\.mesh\.spec=2 divides rows") as refused:
        _prepared(method, mesh={"spec": 2}, relaxation=relaxation)
    assert str(refused.value) == (
        "config.mesh.spec=2 divides rows of linear bounds, which needs crown-ibp (not fused), "
        "cap-ibp, random-slopes, pq-slopes or cap (exact), "
        f"got robust.method={method!r}; set config.mesh.spec=1"
    )


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ExperimentError, match="multiple of the 2 devices, got 33"):
        _prepared(train={"epochs": 1, "batch_size": 33})
    prepared = _prepared(mesh={"spec": 2}, train={"epochs": 1, "batch_size": 33})
    assert prepared.mesh.shape["data"] == 1
