"""One relaxation for several specifications."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import ball_points

import boundjax as bj

pytestmark = pytest.mark.quick


def _network():
    keys = jax.random.split(jax.random.key(0), 3)
    weights = [
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((4, 6), (6, 5), (5, 3)), strict=True)
    ]

    def function(weights, x):
        for weight in weights[:-1]:
            x = jax.nn.relu(x @ weight)
        return x @ weights[-1]

    return function, weights


BALL = bj.LpBall(jnp.asarray([0.3, 0.6, 0.1, 0.9]), 0.1, clip=(0.0, 1.0))


@pytest.mark.parametrize("intermediate", ["interval", "linear"])
@pytest.mark.sampled(3)
def test_a_relaxation_serves_several_specifications(intermediate):
    function, weights = _network()
    options = {"intermediate": intermediate, "sides": "lower"}
    relaxation = bj.relax(lambda x: function(weights, x), **options)(BALL)
    bounds = bj.linear(lambda x: function(weights, x), has_aux=True, **options)
    rows = bj.margin_specification(jnp.int32(1), 3)
    for specification in (rows, jnp.ones((1, 3))):
        result, aux = relaxation.bounds(specification, has_aux=True)
        expected, expected_aux = bounds(BALL, specification)
        np.testing.assert_array_equal(result.lower, expected.lower)
        np.testing.assert_array_equal(
            relaxation.interval(specification).lower, expected_aux.interval.lower
        )
        assert set(aux.rows) == set(relaxation.pre_activations)
    whole = relaxation.bounds()
    assert whole.lower.shape == (3,)
    assert np.all(whole.lower <= function(weights, BALL.center))


@pytest.mark.slow
def test_centers_that_are_references_leave_the_gradient_as_it_is():
    # Values and references share one product with the weights; its derivative must have both parts.
    function, weights = _network()
    rows = bj.margin_specification(jnp.int32(1), 3, rows="others")

    with jax.enable_x64(True):
        ball, rows = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (BALL, rows))
        exact = [jnp.asarray(np.asarray(weight), jnp.float64) for weight in weights]

        def loss(weights):
            margins = bj.linear(lambda x: function(weights, x), sides="lower")(ball, rows)
            return jnp.sum(margins.lower)

        gradient = jax.grad(loss)(exact)
        length = sum(float(jnp.sum(part**2)) for part in gradient)
        ends = [
            float(loss([w + s * g for w, g in zip(exact, gradient, strict=True)]))
            for s in (1e-7, -1e-7)
        ]
    assert (ends[0] - ends[1]) / 2e-7 == pytest.approx(length, rel=1e-4)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"sides must be 'lower', 'upper' or 'both', got 'left'"):
        bj.relax(jnp.sin, sides="left")


# --- bounds from elsewhere ------------------------------------------------------------------------


WIDE = bj.LpBall(BALL.center, 0.4, clip=(0.0, 1.0))


def _relaxed(known=None, ball=WIDE, **options):
    function, weights = _network()
    return bj.relax(lambda x: function(weights, x), known=known, **options)(ball)


def test_known_bounds_take_the_place_of_intermediate_ones():
    rows = bj.margin_specification(jnp.int32(1), 3)
    crown = _relaxed(intermediate="linear")
    given = _relaxed(crown.pre_activations)
    for label, interval in given.pre_activations.items():
        np.testing.assert_allclose(interval, crown.pre_activations[label], atol=1e-6)
    np.testing.assert_allclose(given.bounds(rows), crown.bounds(rows), rtol=1e-5, atol=1e-5)
    plain = _relaxed().bounds(rows)
    assert (given.bounds(rows).lower > plain.lower + 1e-3).any()
    # Known bounds that are no tighter change nothing.
    wide = {k: bj.Interval(v.lower - 1, v.upper + 1) for k, v in _relaxed().pre_activations.items()}
    np.testing.assert_allclose(_relaxed(wide).bounds(rows), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("intermediate", ["interval", "linear", "forward"])
@pytest.mark.parametrize("intersect", [True, False])
@pytest.mark.sampled(7)
def test_with_known_bounds_the_result_holds_where_they_do(intermediate, intersect):
    function, weights = _network()
    options = {"intermediate": intermediate, "intersect": intersect}
    first, second = _relaxed(**options).pre_activations.items()
    # Some units of both layers are fixed to one side of their kinks.
    known = {
        first[0]: bj.Interval(first[1].lower.at[0].set(0.0), first[1].upper),
        second[0]: bj.Interval(second[1].lower, second[1].upper.at[1].set(0.3)),
    }
    rows = jnp.eye(3)
    lower, upper = _relaxed(known, **options).bounds(rows)
    rng = np.random.default_rng(0)
    x = np.clip(np.asarray(WIDE.center) + rng.uniform(-0.4, 0.4, (20000, 4)), 0, 1)
    x = jnp.asarray(x, jnp.float32)
    hidden = x @ weights[0]
    deeper = jax.nn.relu(hidden) @ weights[1]
    holds = (hidden[:, 0] >= 0) & (deeper[:, 1] <= 0.3)
    assert holds.any()
    assert not holds.all()
    outputs = np.asarray(function(weights, x))[np.asarray(holds)]
    assert (lower <= outputs.min(0) + 1e-4).all()
    assert (outputs.max(0) <= upper + 1e-4).all()
    free = _relaxed(**options).bounds(rows)
    assert (lower > free.lower + 1e-3).any() or (upper < free.upper - 1e-3).any()


@pytest.mark.parametrize("p", [1, 2, jnp.inf])
@pytest.mark.parametrize("intermediate", ["interval", "linear", "forward"])
@pytest.mark.sampled(3)
def test_known_bounds_on_the_input_itself(p, intermediate):
    """A set's spread is measured from its own middle, not from that of the known bounds."""
    ball = bj.LpBall(jnp.zeros(2), 1.0, p=p)

    def function(x):
        return jnp.sum(jax.nn.relu(x)) * 0.0 + x

    (label,) = bj.relax(function)(ball).pre_activations
    known = {label: bj.Interval(jnp.array([0.0, -1.0]), jnp.array([1.0, 1.0]))}
    rng = np.random.default_rng(0)
    points = ball_points(rng, np.zeros(2), np.float64(1.0), p, count=4000)
    points = points[points[:, 0] >= 0]
    rows = jnp.asarray(rng.normal(size=(40, 2)), jnp.float32).at[0].set(jnp.array([-0.5, 1.0]))
    relaxation = bj.relax(function, known=known, intermediate=intermediate)(ball)
    lower, upper = relaxation.bounds(rows)
    values = points @ np.asarray(rows, np.float64).T
    assert (lower <= values.min(0) + 1e-6).all()
    assert (values.max(0) <= upper + 1e-6).all()


def test_known_bounds_that_contradict_are_an_error_or_certify_nothing():
    label, interval = next(iter(_relaxed().pre_activations.items()))
    beyond = bj.Interval(interval.upper + 1.0, interval.upper + 2.0)
    with pytest.raises(ValueError, match=r"known bounds of .*contradict its interval at index 0"):
        _relaxed({label: beyond})
    rows = bj.margin_specification(jnp.int32(1), 3)
    bounds = jax.jit(lambda known: _relaxed({label: known}).bounds(rows))(beyond)
    assert np.isnan(bounds).all()


@pytest.mark.parametrize("end", ["lower", "upper"])
def test_known_bounds_that_are_nan_certify_nothing(end):
    label, interval = next(iter(_relaxed().pre_activations.items()))
    broken = interval._replace(**{end: jnp.full_like(interval.lower, jnp.nan)})
    rows = bj.margin_specification(jnp.int32(1), 3)
    bounds = jax.jit(lambda known: _relaxed({label: known}).bounds(rows))(broken)
    assert not (bounds.lower > -jnp.inf).any()


def test_known_bounds_of_no_op_or_of_another_shape_are_refused():
    label, interval = next(iter(_relaxed().pre_activations.items()))
    with pytest.raises(KeyError, match=f"'rely' for no op; known: {label}"):
        _relaxed({"rely": interval})
    with pytest.raises(ValueError, match=rf"'{label}'\] must have shape \(6,\), got .*2,"):
        _relaxed({label: bj.Interval(interval.lower[:2], interval.upper[:2])})


def test_the_radii_of_affine_nodes_are_those_before_any_intersection():
    _, weights = _network()
    walk = _relaxed(intermediate="linear").walk
    radius = WIDE.interval().radius @ jnp.abs(weights[0])
    affine = [n.index for n in walk.graph.nodes if n.primitive == "dot_general"]
    assert set(affine) <= set(walk.radii)
    np.testing.assert_allclose(walk.radii[affine[0]], radius, rtol=1e-5)
    second = walk.intervals[affine[1] - 1].radius @ jnp.abs(weights[1])
    np.testing.assert_allclose(walk.radii[affine[1]], second, rtol=1e-5)
    # Linear bounds are narrower than interval bounds.
    assert (walk.radii[affine[1]] > walk.intervals[affine[1]].radius + 1e-4).any()
