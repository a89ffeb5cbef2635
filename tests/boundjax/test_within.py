"""Rows that hold on parts of the input set: `Relaxation.bounds(rows, within=...)`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj

ROWS = 4
ONE_SIDE = ("lower", "upper")
SLOPES = {
    "adaptive": "adaptive",
    "parallel": "parallel",
    "constant": "constant",
    "optimized": bj.optimized(steps=3),
    "per row": bj.optimized(steps=3, per_spec=True),
}


def _network(rng):
    weights = [rng.normal(size=shape) for shape in ((3, 6), (6, 6), (6, 2))]

    def joint(x):
        x = jax.nn.relu(x @ weights[0])
        return (x @ weights[1]) * jnp.tanh(x @ weights[1][::-1]) @ weights[2]

    def pooled(x):
        x = jax.nn.relu(x @ weights[0]) @ weights[1]
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2,), (1,), "VALID") @ weights[2][1:]

    def plain(x):
        return jax.nn.relu(jax.nn.relu(x @ weights[0]) @ weights[1]) @ weights[2]

    return {"plain": plain, "joint": joint, "pooled": pooled}


def _inputs_of_ops(function, x, labels):
    """The values of pre-activations at points, by label, from intervals of single points."""

    def at(point):
        relaxation = bj.relax(function)(bj.Box(point, point))
        return {label: relaxation.pre_activations[label].middle for label in labels}

    return jax.vmap(at)(x)


CASES = [(kind, slopes, "both") for kind in ("plain", "joint", "pooled") for slopes in SLOPES]
CASES += [("plain", slopes, side) for slopes in ("adaptive", "per row") for side in ONE_SIDE]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "slopes", "sides"), CASES)
def test_every_row_holds_where_its_intervals_do(kind, slopes, sides):
    rng = np.random.default_rng(len(kind + slopes + sides))
    with jax.enable_x64(True):
        function = _network(rng)[kind]
        box = bj.Box(jnp.full(3, -1.0), jnp.full(3, 1.0))
        relaxation = bj.relax(function, slopes=SLOPES[slopes], sides=sides)(box)
        rows = jnp.asarray(rng.normal(size=(ROWS, 2)))
        within = {}
        for label, whole in jax.device_get(relaxation.pre_activations).items():
            # One element is cut in half in each row.
            cut = whole.lower + (whole.upper - whole.lower) * rng.uniform(
                0.4, 0.6, size=(ROWS, *whole.lower.shape)
            )
            side = np.zeros(cut.shape)
            side[np.arange(ROWS), rng.integers(cut.shape[1], size=ROWS)] = rng.choice([-1, 1], ROWS)
            within[label] = bj.Interval(
                jnp.asarray(np.where(side > 0, cut, -np.inf)),
                jnp.asarray(np.where(side < 0, cut, np.inf)),
            )
        bounds = jax.device_get(relaxation.bounds(rows, within=within))
        points = jnp.asarray(rng.uniform(-1, 1, size=(1000, 3)))
        values = np.asarray(jax.vmap(function)(points) @ rows.T)
        at = _inputs_of_ops(function, points, within)
        counts = []
        for k in range(ROWS):
            inside = np.ones(len(points), bool)
            for label, ends in jax.device_get(within).items():
                value = np.asarray(at[label])
                held = (value >= ends.lower[k]) & (value <= ends.upper[k])
                inside &= held.reshape(len(points), -1).all(-1)
            counts.append(inside.sum())
            assert np.all(values[inside, k] >= bounds.lower[k] - 1e-9)
            assert np.all(values[inside, k] <= bounds.upper[k] + 1e-9)
        assert max(counts) > 10


@pytest.mark.parametrize("kind", ["plain", "joint", "pooled"])
@pytest.mark.parametrize("sides", ["lower", "upper", "both"])
@pytest.mark.sampled(6)
def test_a_row_within_is_the_bound_with_these_intervals_known(kind, sides):
    # No other op depends on the pre-activations of the last one.
    rng = np.random.default_rng(1)
    function = _network(rng)[kind]
    with jax.enable_x64(True):
        box = bj.Box(jnp.full(3, -1.0), jnp.full(3, 1.0))
        relaxation = bj.relax(function, sides=sides)(box)
        label = list(relaxation.pre_activations)[-1]
        whole = relaxation.pre_activations[label]
        halves = [
            bj.Interval(whole.lower, whole.middle),
            bj.Interval(whole.middle, whole.upper),
        ]
        row = jnp.asarray(rng.normal(size=2))
        within = {label: jax.tree.map(lambda *ends: jnp.stack(ends), *halves)}
        rows = jnp.stack([row, row])
        # Compare before the intersection with interval bounds, which do not depend on the row.
        bounds = relaxation.bounds(rows, within=within, has_aux=True)[1].linear
        plain = relaxation.bounds(rows, has_aux=True)[1].linear
        gains = []
        for k, half in enumerate(halves):
            relaxed = bj.relax(function, sides=sides, known={label: half})(box)
            expected = relaxed.bounds(rows, has_aux=True)[1].linear
            if sides != "upper":
                assert float(expected.lower[k]) == pytest.approx(float(bounds.lower[k]), abs=1e-9)
                gains.append(bounds.lower[k] - plain.lower[k])
            if sides != "lower":
                assert float(expected.upper[k]) == pytest.approx(float(bounds.upper[k]), abs=1e-9)
                gains.append(plain.upper[k] - bounds.upper[k])
        assert max(gains) > 1e-3


@pytest.mark.slow
def test_nothing_within_changes_nothing():
    function = _network(np.random.default_rng(2))["plain"]
    relaxation = bj.relax(function)(bj.Box(jnp.full(3, -1.0), jnp.full(3, 1.0)))
    rows = jnp.eye(2)
    label = next(iter(relaxation.pre_activations))
    everything = bj.Interval(jnp.full((2, 6), -jnp.inf), jnp.full((2, 6), jnp.inf))
    for within in (None, {}, {label: everything}):
        bounds = relaxation.bounds(rows, within=within)
        for end, expected in zip(bounds, relaxation.bounds(rows), strict=True):
            np.testing.assert_allclose(end, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    function = _network(np.random.default_rng(2))["plain"]
    relaxation = bj.relax(function)(bj.Box(jnp.full(3, -1.0), jnp.full(3, 1.0)))
    label = next(iter(relaxation.pre_activations))
    ends = bj.Interval(jnp.zeros((3, 6)), jnp.ones((3, 6)))
    with pytest.raises(
        ValueError, match=r"within\[.*\] must have shape \(2, 6\), got \[\(3, 6\)\]"
    ):
        relaxation.bounds(jnp.eye(2), within={label: ends})
    with pytest.raises(KeyError, match="within has an entry 'tanh' for no op"):
        relaxation.bounds(jnp.eye(2), within={"tanh": ends})
    with pytest.raises(ValueError, match="within needs a specification"):
        relaxation.bounds(within={label: ends})
