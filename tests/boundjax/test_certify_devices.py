"""certify on several devices: the answers of one, no communication, and the memory of each."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax import sharding
from boundjax.certification import memory
from boundjax.certification.request import Request

EXAMPLES, CLASSES, EPS = 7, 4, 0.02
CLIP = (0.0, 1.0)
# Collective operations of a compiled program; each would make a device wait for the others.
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
pytestmark = pytest.mark.xdist_group("certify_devices")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (2, 2), strides=2)(x)).reshape(x.shape[0], -1)
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(8)(x)))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(size=(EXAMPLES, 4, 4, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def model(images):
    return Net(), jax.jit(Net().init)(jax.random.key(1), images)


@functools.cache
def devices():
    result = tuple(jax.local_devices())
    assert len(result) == 2
    return result


# Methods that vmap over the examples, and one that runs them one by one on CPU. Neither seven
# examples nor batches of three divide by two.
@pytest.mark.parametrize("method", ["interval", "crown-ibp", "crown"])
@pytest.mark.sampled(4)
def test_two_devices_find_what_one_finds(method, model, images):
    options = {"method": method, "clip": CLIP}
    alone = bj.certify(model, images, EPS, **options)
    for batch_size in (None, 3):
        shared = bj.certify(model, images, EPS, **options, batch_size=batch_size, devices=devices())
        np.testing.assert_allclose(shared.margins, alone.margins, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(shared.verified, alone.verified)
        np.testing.assert_array_equal(shared.labels, alone.labels)
    assert alone.verified.any()


@pytest.mark.parametrize("method", ["interval", "crown-ibp", "crown"])
def test_the_devices_send_each_other_nothing(method, model, images):
    threat = bj.Threat(EPS, np.inf, CLIP)
    request = Request.check(model, images, threat, None, method, "real", None, None, devices())
    plan = request.plan(method)
    assert plan.batch_size == 8  # seven, padded to a multiple of two
    filled = [np.resize(a, (8, *a.shape[1:])) for a in (images, request.eps, request.labels)]
    placed = [sharding.parts(array, request.mesh) for array in filled]
    assert all(len(array.sharding.device_set) == 2 for array in placed)
    margins = plan.margins(request.variables, threat, *placed)
    assert [shard.data.shape for shard in margins.addressable_shards] == [(4, CLASSES)] * 2
    text = plan.margins.lower(request.variables, threat, *placed).compile().as_text()
    assert "num_partitions=2" in text
    assert not [name for name in COLLECTIVES if name in text]


@pytest.mark.slow
def test_every_kind_of_model_and_question(model, images):
    """A closure over its weights, a user's transform, float64, balls, and radii by bisection."""
    closure = functools.partial(model[0].apply, model[1])

    def hidden(x):
        return closure(x)

    transform = functools.partial(bj.linear, intermediate="interval")
    for kind, method in ((hidden, "interval"), (model, transform)):
        expected = bj.certify(kind, images, EPS, method=method)
        shared = bj.certify(kind, images, EPS, method=method, devices=devices())
        np.testing.assert_allclose(shared.margins, expected.margins, rtol=1e-5, atol=1e-6)
    radius = functools.partial(
        bj.certified_radius, model, images, method="interval", norm=2, steps=4, clip=CLIP
    )
    np.testing.assert_allclose(radius(devices=devices()), radius(), atol=1e-6)
    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model[1])
        shared = bj.certify(
            (model[0], doubles),
            images.astype(np.float64),
            EPS,
            method="interval",
            clip=CLIP,
            devices=devices(),
        )
    assert shared.margins.dtype == np.float64
    expected = bj.certify(model, images, EPS, method="interval", clip=CLIP)
    np.testing.assert_allclose(shared.margins, expected.margins, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_that_mixes_examples_is_refused_as_on_one_device(count, images):
    x = images.reshape(EXAMPLES, -1)[:count]

    def mixing(batch):
        return batch[:, :3] - jnp.mean(batch[:, :3], axis=0, keepdims=True)

    with pytest.raises(ValueError, match="independently"):
        bj.certify(mixing, x, 0.1, method="interval", devices=devices())


@pytest.mark.slow
def test_memory_is_that_of_each_device(model, images):
    whole = bj.memory_estimate(model, images[:4], "crown-ibp")
    shared = bj.memory_estimate(
        model, np.tile(images, (2, 1, 1, 1))[:8], "crown-ibp", devices=devices()
    )
    assert (whole.batch_size, shared.batch_size) == (4, 8)
    assert shared.peak == pytest.approx(whole.peak, rel=0.1)
    # The budget is per device, so each needs to fit only half of the batch.
    options = {"method": "crown-ibp", "devices": devices()}
    fits = bj.memory_estimate(model, images, max_bytes=shared.peak - 1, **options).batch_size
    assert fits % 2 == 0
    assert 2 <= fits < 8
    with pytest.raises(MemoryError, match=rf"batch_size 8 .* on each device.*batch_size={fits}"):
        bj.certify(model, images, EPS, batch_size=8, max_bytes=shared.peak - 1, **options)


def test_the_devices_of_a_cpu_have_one_memory(monkeypatch):
    monkeypatch.setattr(memory, "_within_container", lambda free: 1000)
    assert memory.available_bytes() == 1000
    assert memory.available_bytes(devices()) == 500


def test_devices_that_cannot_be_are_refused(model, images):
    class Elsewhere:
        process_index = 1

    for wrong, message in (
        ((), "at least one device"),
        (devices()[:1] * 2, "must differ from each other"),
        ((*devices(), Elsewhere()), "of this process, as jax.local_devices.* of process 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bj.certify(model, images, EPS, method="interval", devices=wrong)
