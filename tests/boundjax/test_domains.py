"""Bounds on the domains of a branch and bound hold where the domains are."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kinked import KINKED
from rationals import exact

import boundjax as bj
from boundjax.ir import table
from boundjax.ir.families import Scalar
from boundjax.sets.rounding import Arithmetic
from boundjax.transforms import domains, optimize
from boundjax.transforms.domains import Domains, Splits

N = 40
POINTS = jnp.asarray(np.random.default_rng(2).uniform(-1.0, 1.0, size=(4000, 3)), jnp.float32)


def network(kinked):
    random = np.random.default_rng(0)
    first, second, third = (
        jnp.asarray(random.normal(size=shape) / 2.0, jnp.float32)
        for shape in ((3, 5), (5, 5), (5, 2))
    )

    def function(x):
        x = kinked(x @ first + 0.1)
        return kinked(x @ second - 0.2) @ third + x[:2]

    return function


def operands_of(walk, function, points):
    """The values of the operands that are split, `[P, U]`."""
    splits = Splits.of(walk.graph)

    def at(point):
        references = bj.relax(function)(bj.Box(point, point)).walk.references
        return jnp.concatenate([references[kink.operand].reshape(-1) for kink in splits.kinks])

    return np.asarray(jax.jit(jax.vmap(at))(points))


def drawn(walk, function, random):
    """Random domains around points, split at a third of the units, with any parameters."""
    splits = Splits.of(walk.graph)
    walk.relaxations.make(range(1, len(walk.graph.nodes)))
    beyond = operands_of(walk, function, POINTS[:N]) - kinks_of(splits)
    signs = np.sign(beyond) * (random.uniform(size=beyond.shape) < 0.3)
    positions = {
        label: jnp.asarray(random.uniform(size=(N, *value.shape)), jnp.float32)
        for label, value in walk.relaxations.slopes.items()
    }
    multipliers = random.exponential(size=signs.shape) * random.integers(0, 2, (N, 1))
    return Domains(jnp.asarray(signs, jnp.int8), positions, jnp.asarray(multipliers, jnp.float32))


def kinks_of(splits):
    return np.concatenate([kink.points().reshape(-1) for kink in splits.kinks])


def least_inside(walk, function, rows, signs):
    """The least sampled value on each domain, and on the whole box."""
    values = np.asarray(jax.vmap(function)(POINTS) @ rows.T)
    beyond = operands_of(walk, function, POINTS) - kinks_of(Splits.of(walk.graph))
    inside = (beyond[:, None] * np.asarray(signs) >= 0).all(axis=-1)
    assert inside.any(axis=0).all()
    return np.where(inside, values, np.inf).min(axis=0), values.min(axis=0)


DAILY = ("relu", "clip", "relu and tanh")
NAMES = [pytest.param(n, marks=[] if n in DAILY else pytest.mark.slow) for n in KINKED]


@pytest.mark.parametrize("rounding", ["nearest", "float32"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sampled(4)
def test_bounds_hold_on_the_domains(name, rounding):
    function, random = network(KINKED[name]), np.random.default_rng(1)
    box = bj.Box(jnp.full(3, -1.0), jnp.full(3, 1.0))
    walk = bj.relax(function, sides="lower", rounding=rounding)(box).walk
    parts = drawn(walk, function, random)
    rows = jnp.asarray(random.normal(size=(N, 2)), jnp.float32)
    bounds = domains.bound(walk, rows, parts)
    least, _ = least_inside(walk, function, rows, parts.signs)
    slack = 1e-5 if rounding == "nearest" else 0.0
    assert (np.asarray(bounds.lower) <= least + slack).all()


@pytest.mark.parametrize("name", ["relu", pytest.param("clip", marks=pytest.mark.slow)])
def test_the_best_bounds_hold_and_are_above_the_least_value_of_the_box(name):
    function, random = network(KINKED[name]), np.random.default_rng(1)
    box = bj.Box(jnp.full(3, -1.0), jnp.full(3, 1.0))
    walk = bj.relax(function, sides="lower", intermediate="linear")(box).walk
    parts = drawn(walk, function, random)
    rows = jnp.asarray(random.normal(size=(N, 2)), jnp.float32)

    def bound(parameters):
        return domains.bound(walk, rows, Domains(parts.signs, *parameters)).lower

    projection = (dict.fromkeys(parts.positions, optimize.unit_interval), jax.nn.relu)
    ascent = optimize.Ascent(bound, True, bj.optimized(20, optax.adam(0.1), True), projection)
    lower = np.asarray(jax.jit(ascent.run)((parts.positions, parts.multipliers)).values)
    least, of_the_box = least_inside(walk, function, rows, parts.signs)
    assert (lower <= least + 1e-5).all()
    assert (lower > of_the_box).sum() > 2


def test_a_domain_without_splits_has_the_bounds_of_the_whole_box():
    function = network(jax.nn.relu)
    box = bj.Box(jnp.full(3, -0.2), jnp.full(3, 0.3))
    relaxation = bj.relax(function, sides="lower", intermediate="linear", intersect=False)(box)
    rows = jnp.eye(2)
    _, aux = relaxation.bounds(rows, has_aux=True)
    positions = {k: jnp.stack([v, v]) for k, v in relaxation.walk.relaxations.slopes.items()}
    splits = Splits.of(relaxation.walk.graph)
    nothing = jnp.zeros((2, splits.size))
    whole = Domains(nothing.astype(jnp.int8), positions, nothing + 1.0)
    bounds = domains.bound(relaxation.walk, rows, whole)
    assert bounds.lower == pytest.approx(aux.linear.lower, abs=1e-6)
    assert bounds.worst_input == pytest.approx(aux.worst_input)
    unstable = np.asarray(splits.unstable(relaxation.walk.intervals))
    assert ((np.asarray(bounds.scores) >= 0) == unstable).all()


def test_multipliers_alone_prove_what_intervals_cannot():
    """On `x <= 0` the function `y - x` is not negative; only the multiplier of x knows."""

    def function(x):
        return jax.nn.relu(x[1:]) - x[:1] + 0.0 * jax.nn.relu(x[:1])

    box = bj.Box(jnp.full(2, -1.0), jnp.full(2, 1.0))
    walk = bj.relax(function, sides="lower")(box).walk
    splits = Splits.of(walk.graph)
    walk.relaxations.make(range(1, len(walk.graph.nodes)))
    (unit,) = np.flatnonzero(operands_of(walk, function, jnp.asarray([[0.5, -0.5]]))[0] == 0.5)
    signs = jnp.zeros((2, splits.size), jnp.int8).at[:, unit].set(-1)
    multipliers = jnp.zeros((2, splits.size)).at[1, unit].set(1.0)
    positions = {k: jnp.zeros((2, *v.shape)) for k, v in walk.relaxations.slopes.items()}
    bounds = domains.bound(walk, jnp.ones((2, 1)), Domains(signs, positions, multipliers))
    assert bounds.lower == pytest.approx(jnp.asarray([-1.0, 0.0]), abs=1e-6)


COUNT = 256
# Added to 1 one after another each of them is rounded up to a spacing, twice its value.
TERMS = np.concatenate([[1.0], np.full(COUNT - 1, 2.0**-24 * (1.0 + 2.0**-10))]).astype(np.float32)
IN_ORDER = functools.reduce(np.add, TERMS)


def bound_behind_a_sum(at, sign, multiplier):
    """A lower bound of 0 on a domain that is split at a sum of `TERMS`."""

    def bound(ones):
        walk = bj.relax(
            lambda x: 0.0 * jnp.maximum(x @ TERMS[:, None], at), sides="lower", rounding="float32"
        )(bj.Box(ones, ones)).walk
        walk.relaxations.make(range(1, len(walk.graph.nodes)))
        positions = {k: jnp.zeros((1, *v.shape)) for k, v in walk.relaxations.slopes.items()}
        signs = jnp.full((1, 1), sign, jnp.int8)
        multipliers = jnp.full((1, 1), multiplier, jnp.float32)
        return domains.bound(walk, jnp.ones((1, 1)), Domains(signs, positions, multipliers))

    bounds = jax.jit(bound)(jnp.ones(COUNT))
    return float(bounds.lower[0]), bool(bounds.empty[0])


# Compiled as users do: jax 0.9 without optimisations adds the sum of the bound itself in order.
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("multiplier", [1.0, 1e6])
def test_multipliers_count_what_their_operands_round(multiplier, monkeypatch):
    """Programs that add in order are on the upper side of the kink, the exact sum is not."""
    exact_sum = float(sum(exact(TERMS)))
    at = np.float32(0.5 * (exact_sum + float(IN_ORDER)))
    assert exact_sum < at < IN_ORDER
    for sign in (1, -1):
        lower, empty = bound_behind_a_sum(at, sign, multiplier)
        assert not empty
        assert lower <= 0.0
    gamma = Arithmetic.gamma
    monkeypatch.setattr(Arithmetic, "gamma", lambda self, terms: 0.02 * gamma(self, terms))
    lower, empty = bound_behind_a_sum(at, 1, multiplier)
    assert empty or lower > 0.0


def test_a_negative_multiplier_counts_as_none():
    assert bound_behind_a_sum(np.float32(0.5), -1, -1e6) == bound_behind_a_sum(
        np.float32(0.5), -1, 0.0
    )


def test_every_op_with_parts_states_its_kinks():
    """Steps have no parts in which a search could end: they are where the op is not continuous."""
    silent = Scalar.__dataclass_fields__["kinks"].default
    for op in itertools.chain.from_iterable(table._TABLE.values()):
        if isinstance(op, Scalar):
            assert (op.kinks is not silent) == (op.pieces and not op.jumps), op.name
