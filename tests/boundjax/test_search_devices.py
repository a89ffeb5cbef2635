"""Several devices divide the domains of a search: its answers and proofs are those of one."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

import boundjax as bj
from boundjax import check_tree, properties, sharding
from boundjax.search import Leaf, Programs
from boundjax.search.domain_bounds import Parameters
from boundjax.sets.box import Box

INPUTS, OUTPUTS = 4, 2
BOX = bj.Box(-jnp.ones(INPUTS), jnp.ones(INPUTS))
# Collective operations of a compiled program; each would make a device wait for the others.
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
# One worker compiles the programs once.
pytestmark = pytest.mark.xdist_group("search_devices")


def function(x):
    """A small network with random weights."""
    random = np.random.default_rng(7)
    for inputs, outputs in ((INPUTS, 8), (8, 8)):
        kernel = random.normal(size=(inputs, outputs)) / inputs**0.5
        bias = 0.3 * random.normal(size=outputs)
        x = nn.relu(x @ jnp.asarray(kernel, jnp.float32) + jnp.asarray(bias, jnp.float32))
    return x @ jnp.asarray(random.normal(size=(8, OUTPUTS)), jnp.float32)


@pytest.fixture(scope="module")
def least():
    """The exact minimum of the first output."""
    optimum = bj.milp_optimum(function, BOX, np.eye(OUTPUTS)[0])
    assert optimum.status == "optimal"
    return optimum.lower


@pytest.fixture(scope="module")
def one():
    return Programs(function, (INPUTS,))


@pytest.fixture(scope="module")
def two():
    assert len(jax.local_devices()) == 2
    return Programs(function, (INPUTS,), devices=jax.local_devices())


def decide(programs, offset, max_split_inputs=0, **options):
    property = properties.all_positive(np.eye(OUTPUTS)[:1], offset)
    options |= {"programs": programs, "max_split_inputs": max_split_inputs}
    return bj.prove(function, BOX, property, **options)


def tree_of(result):
    """The nodes of the proof in preorder, without the numbers of the leaves."""
    (case,) = result.proof.cases
    nodes = case.recorder.walk(case.roots[0], 0)
    return ["leaf" if isinstance(node, Leaf) else node for node in nodes]


@pytest.mark.parametrize("max_split_inputs", [0, 20], ids=["units are split", "the box is split"])
@pytest.mark.sampled(2)
def test_answers_of_two_devices_are_those_of_one(max_split_inputs, one, two, least, tmp_path):
    alone, shared = (
        decide(programs, 1e-3 - least, max_split_inputs, with_proof=True) for programs in (one, two)
    )
    assert alone.verdict == shared.verdict == "unsat"
    for result in (alone, shared):
        assert 0 < result.margins[0] <= 1e-3 + 1e-5
    weights = tmp_path / "w.npz"
    bj.export_weights(jax.vmap(function), np.zeros((1, INPUTS), np.float32), weights)
    bj.save_proof(tmp_path / "p.npz", shared.proof, weights)
    assert check_tree.main([str(tmp_path / "p.npz"), "--weights", str(weights)]) == 0
    assert len(tree_of(shared)) > 3
    broken = decide(two, -1e-3 - least, max_split_inputs)
    assert broken.verdict == "sat"
    assert function(broken.counterexample.inputs)[0] - 1e-3 - least <= 0


@pytest.mark.slow
def test_the_tree_depends_on_the_size_of_batches_alone(one, two, least):
    assert two.domains.sizes == tuple(2 * size for size in one.domains.sizes)
    assert (two.few_boxes, two.boxes) == (2 * one.few_boxes, 2 * one.boxes)
    alone = Programs(function, (INPUTS,))
    alone.domains.sizes = two.domains.sizes
    first, second = (decide(p, 1e-3 - least, with_proof=True) for p in (alone, two))
    assert tree_of(first) == tree_of(second)
    assert [r.domains for r in first.rounds] == [r.domains for r in second.rounds]
    np.testing.assert_allclose(first.margins, second.margins, rtol=1e-2, atol=1e-5)


def batch(programs):
    """The arguments of the programs of a batch, and the state of an optimiser."""
    domains = programs.domains
    root = domains.root(BOX.lower, BOX.upper, jnp.eye(OUTPUTS), domains.unknown)
    size = domains.sizes[0]
    shared = domains.whole((Box(BOX.lower, BOX.upper), root.intervals))
    signs = domains.parts(np.zeros((size, domains.units), np.int8))
    parameters = Parameters(
        domains.parts(np.tile(np.asarray(root.positions), (size, 1))),
        domains.parts(np.zeros((size, domains.units), np.float32)),
        domains.parts(np.ones((size, 1), np.float32)),
    )
    rows = domains.parts(np.ones((size, OUTPUTS), np.float32))
    return shared, signs, rows, parameters


@pytest.mark.parametrize("name", ["step", "evaluate", "probe", "lines"])
def test_a_program_of_a_batch_sends_nothing(name, two):
    shared, signs, rows, parameters = batch(two)
    program = getattr(two.domains, name)
    arguments = *shared, signs, rows, parameters
    if name == "step":
        offset = two.domains.parts(np.zeros((len(rows), 1), np.float32))
        state = two.domains.begin(parameters)
        arguments = *shared, signs, two.domains.parts(np.asarray(rows)[:, None]), offset, state
    with two.on_device():  # as in a search, so that nothing is compiled twice
        _without_collectives(program, arguments, len(rows))


def test_sub_boxes_send_nothing(two):
    size = two.few_boxes
    ends = (np.tile(np.asarray(end), (size, 1)) for end in (BOX.lower, BOX.upper))
    arrays = (
        *ends,
        np.ones((size, 1, OUTPUTS), np.float32),
        np.zeros((size, 1), np.float32),
        np.zeros((size, 1), np.int32),
        np.ones((size, 1), bool),
    )
    _without_collectives(two.split("crown"), tuple(map(two.parts, arrays)), size)


def _without_collectives(program, arguments, size):
    text = program.lower(*arguments).compile().as_text()
    assert "num_partitions=2" in text
    assert not [collective for collective in COLLECTIVES if collective in text]
    for array in jax.tree.leaves(program(*arguments)):
        if array.ndim:  # not the number of steps
            shapes = [shard.data.shape for shard in array.addressable_shards]
            assert shapes == [(size // 2, *array.shape[1:])] * 2


def test_a_step_is_compiled_once(two, least):
    """The first state is divided like those after it."""
    decide(two, 1e-3 - least)
    step, shapes = two.network._compiled["step", None]
    assert step._cache_size() == len(shapes)


def test_the_named_device_computes(least):
    device = jax.local_devices()[1]
    programs = Programs(function, (INPUTS,), devices=[device])
    with programs.on_device():
        assert programs.forward(np.zeros(INPUTS, np.float32)).devices() == {device}
    evaluated = programs.domains.evaluate
    shared, signs, rows, parameters = batch(programs)
    assert evaluated(*shared, signs, rows, parameters).lower.devices() == {device}
    assert decide(programs, 1e-3 - least).verdict == "unsat"


def test_weights_as_arguments_are_on_every_device():
    kernels = [
        jnp.asarray(np.random.default_rng(seed).normal(size=(30, OUTPUTS)), jnp.float32)
        for seed in range(2)
    ]
    apply = lambda kernel, x: nn.relu(x) @ jnp.abs(kernel)  # noqa: E731
    compiled = {}
    box = bj.Box(-jnp.ones(30), jnp.ones(30))
    for kernel in kernels:
        programs = Programs(
            apply, (30,), weights=kernel, compiled=compiled, devices=jax.local_devices()
        )
        step = programs.domains.step
        assert step._weights.sharding.device_set == set(jax.local_devices())
        for offset, verdict in ((1e-3, "unsat"), (-1e-3, "sat")):
            property = properties.all_positive(np.eye(OUTPUTS)[:1], offset)
            f = lambda x, kernel=kernel: apply(kernel, x)  # noqa: E731
            assert bj.prove(f, box, property, programs=programs).verdict == verdict


@pytest.mark.quick
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_every_device_must_have_a_proof(platform, monkeypatch):
    """Also where the first one has: results of all of them are proofs or none is."""
    devices = [SimpleNamespace(platform=name) for name in ("cpu", platform)]
    mesh = SimpleNamespace(devices=np.array(devices), size=2)
    monkeypatch.setattr(sharding, "mesh_of", lambda *arguments, **options: mesh)
    with pytest.raises(bj.NoProofError, match=f"nothing is proved about rounding on '{platform}'"):
        Programs(lambda x: x, (2,), devices=devices)
    with pytest.raises(bj.NoProofError, match=f"nothing is proved about rounding on '{platform}'"):
        bj.certify(
            lambda x: x, jnp.ones((2, 2)), 0.1, rounding="real", devices=devices, method="complete"
        )


@pytest.mark.quick
def test_devices_that_are_refused(one):
    device = jax.local_devices()[0]
    with pytest.raises(ValueError, match="devices must name at least one device"):
        bj.prove(function, BOX, properties.all_positive(np.eye(OUTPUTS)), devices=[])
    with pytest.raises(ValueError, match="devices must differ from each other"):
        Programs(function, (INPUTS,), devices=[device, device])
    for options in ({"devices": [device]}, {"max_bytes": 2**20}):
        with pytest.raises(ValueError, match="those of the programs; state them to Programs"):
            decide(one, 0.0, **options)


def test_sub_boxes_are_bounded_as_on_one_device(one, two):
    """Bounds of boxes that differ, in their order."""
    size = two.few_boxes
    lower = np.random.default_rng(0).uniform(-1, 0, size=(size, INPUTS)).astype(np.float32)
    arrays = (
        lower,
        lower + 0.5,
        np.tile(np.eye(OUTPUTS, dtype=np.float32), (size, 1, 1)),
        np.zeros((size, OUTPUTS), np.float32),
        np.tile(np.arange(OUTPUTS, dtype=np.int32), (size, 1)),
        np.ones((size, OUTPUTS), bool),
    )
    results = [p.split("crown")(*map(p.parts, arrays)) for p in (one, two)]
    for alone, shared in itertools.zip_longest(*results):
        np.testing.assert_allclose(alone, shared, rtol=1e-4, atol=1e-5)
