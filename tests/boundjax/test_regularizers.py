import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from flax import nnx

import boundjax as bj
from boundjax.training import (
    gap_to_attained,
    l1_norm,
    relaxation_slack,
    relu_balance_loss,
    relu_stability_loss,
    relu_states,
    tightness_loss,
)


def _layers(seed, sizes, bias=0.3):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(m, n)) / np.sqrt(n), bias * rng.normal(size=m))
        for n, m in itertools.pairwise(sizes)
    ]


def _batch_bounds(eps=0.2, batch=5):
    """An input box `[B, 4]` and interval bounds of the 6 + 7 ReLUs of a random net, in numpy."""
    layers = _layers(3, (4, 6, 7))
    x = np.random.default_rng(4).uniform(size=(batch, 4))
    box = bj.Interval(np.clip(x - eps, 0, 1), np.clip(x + eps, 0, 1))
    lower, upper = box
    bounds = {}
    for k, (weight, bias) in enumerate(layers):
        middle, radius = (lower + upper) / 2 @ weight.T + bias, (upper - lower) / 2 @ abs(weight).T
        bounds[f"relu_{k}"] = bj.Interval(middle - radius, middle + radius)
        lower, upper = np.maximum(middle - radius, 0), np.maximum(middle + radius, 0)
    return box, bounds


def _as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def _layer(*bounds):
    """One layer of one example, from pairs `(l, u)`."""
    lower, upper = np.array(bounds, float).T
    return {"relu": bj.Interval(lower[None], upper[None])}


def _gradients_are_finite_differences(run, argument):
    """Checks a compiled `run: argument -> (value, gradient)` in one random direction."""
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda a: rng.normal(size=a.shape), argument)

    def moved(step):
        return jax.tree.map(lambda a, d: a + step * d, argument, direction)

    difference = (run(moved(1e-6))[0] - run(moved(-1e-6))[0]) / 2e-6
    products = jax.tree.map(lambda g, d: np.sum(g * d), run(argument)[1], direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), difference, rtol=1e-6, atol=1e-7)


# --- Shi et al. 2021 ------------------------------------------------------------------------------


def _tightness(box, bounds, tau):
    given = np.mean((box.upper - box.lower) / 2)
    ratios = [given / np.mean((b.upper - b.lower) / 2) for b in bounds.values()]
    return np.mean([max(tau - ratio, 0) / tau for ratio in ratios])


def _balance(bounds, tau):
    total = 0.0
    for lower, upper in bounds.values():
        center = (lower + upper) / 2
        on, off = lower > 0, upper < 0
        if not (on.any() and off.any()):
            continue
        alpha = np.mean(center * on) / -np.mean(center * off)
        square = (center - center.mean()) ** 2
        beta = np.sum(square * on) / np.sum(square * off)
        for ratio in (alpha, beta):
            inverse = 1 / ratio if ratio else np.inf
            total += max(tau - min(ratio, inverse), 0) / tau
    return total / len(bounds)


TAUS = (0.3, 0.5, 1.0)


@on_host
def _short_warmup(arguments):
    """A weighted sum of both losses, the losses for each tolerance, and the sum's gradient."""

    def weighted(arguments):
        box, bounds = arguments
        values = [(tightness_loss(box, bounds, t), relu_balance_loss(bounds, t)) for t in TAUS]
        return values[1][0] + 0.7 * values[1][1], values

    (total, values), gradient = jax.value_and_grad(weighted, has_aux=True)(arguments)
    return total, gradient, values


def test_losses_of_short_warmup_are_their_definitions():
    with jax.enable_x64(True):
        box, bounds = _batch_bounds(0.05)
        # Unbalanced ReLUs: active and inactive ones, more of the latter.
        bounds["relu_1"] = bj.Interval(*(end - 0.3 for end in bounds["relu_1"]))
        expected = np.array([(_tightness(box, bounds, t), _balance(bounds, t)) for t in TAUS])
        assert (expected[1:] > 0).all()
        np.testing.assert_allclose(_short_warmup((box, bounds))[2], expected, rtol=1e-12)
        _gradients_are_finite_differences(_short_warmup, (box, bounds))


def test_tightness_is_free_up_to_the_tolerance():
    unit = bj.Interval(np.zeros((2, 3)), np.ones((2, 3)))
    for widening, expected in [(0.1, 0.0), (1.9, 0.0), (4.0, 0.5), (1e6, 1.0)]:
        bounds = {"a": bj.Interval(unit.lower, widening * unit.upper), "b": unit}
        result = tightness_loss(*_as_jax((unit, bounds)))
        np.testing.assert_allclose(result, expected / 2, atol=1e-5)


DEGENERATE = {
    "no active": _layer((-3, -1), (-2, -1), (-1, 1)),
    "no inactive": _layer((1, 3), (1, 2), (-1, 1)),
    "all unstable": _layer((-1, 3), (-2, 1), (-1, 1)),
    "all unstable and equal": _layer((-1, 3), (-1, 3), (-1, 3)),
    "zero variance": _layer((1, 3), (1, 3), (1, 3)),
    "balanced": _layer((1, 3), (-3, -1), (-1, 1)),
    "active ones at the mean": _layer((0.5, 1.5), (-1, 7), (-1.5, -0.5)),
    "points": _layer((1, 1), (-2, -2), (-3, -3)),
    "zeros": _layer((0, 0), (0, 0), (0, 0)),
}


def test_degenerate_balance():
    run = on_host(jax.value_and_grad(relu_balance_loss))
    with jax.enable_x64(True):
        for case, bounds in DEGENERATE.items():
            value, gradient = run(bounds)
            expected = {"active ones at the mean": 1.0, "points": 0.6}.get(case, 0.0)
            np.testing.assert_allclose(_balance(bounds, 0.5), expected, atol=1e-12)
            np.testing.assert_allclose(value, expected, atol=1e-12)
            assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
            assert expected > 0 or not any(np.any(g) for g in jax.tree.leaves(gradient))
            if case != "zeros":  # where the loss jumps, by definition
                _gradients_are_finite_differences(run, bounds)


def test_losses_at_the_ends_of_float32():
    # Squares and quotients that overflow or underflow make no NaN, and losses of intervals without
    # width are 0.
    losses = on_host(
        lambda box, bounds: [
            jax.value_and_grad(loss)(bounds)
            for loss in (partial(tightness_loss, box), relu_balance_loss, relu_stability_loss)
        ]
    )
    for size, eps in itertools.product((0.0, 1e-38, 1e-30, 1e-6, 1e15), (0.0, 1e-30, 1e-3)):
        box = bj.Interval(np.full((1, 2), -eps, np.float32), np.full((1, 2), eps, np.float32))
        for bounds in (_layer((1, 3), (-9, -7), (-2, -1)), _layer((-1, 2), (2, 4), (-1, -1))):
            bounds = jax.tree.map(lambda b, size=size: np.float32(size * b), bounds)
            for value, gradient in losses(box, bounds):
                assert np.isfinite(value)
                assert not any(np.isnan(g).any() for g in jax.tree.leaves(gradient))
    zero = bj.Interval(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    assert tightness_loss(zero, {"relu": zero}) == 0.0


def test_nan_shows():
    run = on_host(
        lambda box, bounds: (
            tightness_loss(box, bounds),
            relu_balance_loss(bounds),
            relu_stability_loss(bounds),
        )
    )
    (_, bounds), nan = _batch_bounds(), np.where(np.arange(30).reshape(5, 6) == 7, np.nan, 1.0)
    lower, upper = bounds["relu_0"]
    box = bj.Interval(lower, upper)
    for bad in (bj.Interval(nan * lower, upper), bj.Interval(lower, nan * upper)):
        assert np.isnan(run(box, {**bounds, "relu_0": bad})).all()
        assert np.isnan(run(bad, bounds)[0])
        # This holds with neither active nor inactive ReLUs, too, and with both.
        for shift in (-100.0, 100.0, 100.0 * np.sign(lower)):
            moved = jax.tree.map(lambda b, shift=shift: b + shift, bad)
            assert np.isnan(run(box, {**bounds, "relu_0": moved})).all()


# --- others ---------------------------------------------------------------------------------------


def test_relu_stability_is_its_definition():
    with jax.enable_x64(True):
        _, bounds = _batch_bounds()
        expected = np.mean(
            sum(-np.tanh(1 + b.lower * b.upper).sum(axis=1) for b in bounds.values())
        )
        run = on_host(jax.value_and_grad(relu_stability_loss))
        np.testing.assert_allclose(run(bounds)[0], expected, rtol=1e-12)
        _gradients_are_finite_differences(run, bounds)


def test_relu_states_are_counted_over_layers_and_batch():
    _, bounds = _batch_bounds(0.1)
    lower = np.concatenate([b.lower.ravel() for b in bounds.values()])
    upper = np.concatenate([b.upper.ravel() for b in bounds.values()])
    for margin in (0.0, 0.2):
        dead = upper <= margin
        active = (lower >= 0) & ~dead
        expected = active.mean(), (~active & ~dead).mean(), dead.mean()
        assert min(expected) > 0
        result = relu_states(jax.tree.map(jnp.float32, bounds), margin)
        np.testing.assert_allclose(result, expected, rtol=1e-6)
    states = relu_states(_as_jax(_layer((0, 0), (np.nan, 1), (0, 1), (np.nan, np.nan))))
    assert tuple(map(float, states)) == (0.25, 0.5, 0.25)


def test_l1_norm_counts_kernels():
    kernels = [np.array([[1.0, -2.0]], np.float32), np.array([[-0.5], [0.0]], np.float32)]
    params = {
        "conv": {"kernel": kernels[0], "bias": -np.ones(2, np.float32)},
        "kernel": {"scale": 3 * np.ones(2, np.float32), "dense": {"kernel": kernels[1]}},
    }
    assert l1_norm(params) == 3.5
    assert l1_norm(params, kernels_only=False) == 11.5
    gradient = jax.grad(l1_norm)(params)
    np.testing.assert_array_equal(gradient["kernel"]["dense"]["kernel"], np.sign(kernels[1]))
    assert not np.any(gradient["kernel"]["scale"])
    assert l1_norm(nnx.State({"kernel": nnx.Param(kernels[0]), "bias": nnx.Param(kernels[1])})) == 3


def test_bad_input_is_an_error():
    interval = bj.Interval(jnp.zeros((1, 2)), jnp.ones((1, 2)))
    one = {"relu": interval}
    for tau in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"tau must lie in \(0, 1\], got"):
            tightness_loss(interval, one, tau)
        with pytest.raises(ValueError, match=r"tau must lie in \(0, 1\], got"):
            relu_balance_loss(one, tau)
    for loss in (relu_balance_loss, relu_stability_loss, relu_states):
        with pytest.raises(ValueError, match=r"at least one ReLU"):
            loss({})
    with pytest.raises(ValueError, match=r"dead_margin must be >= 0, got -1"):
        relu_states(one, -1.0)
    with pytest.raises(ValueError, match=r"hold no kernel, got \[\"\['bias'\]\"\]"):
        l1_norm({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"one shape \[\.\.\., m\], got \(2, 3\) and \(3,\)"):
        gap_to_attained(jnp.ones((2, 3)), jnp.ones(3))
    single, two = {"relu": bj.Interval(jnp.zeros(2), jnp.ones(2))}, {"relu": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=r"same labels, got \['relu'\], \['other'\]"):
        relaxation_slack(single, {"other": jnp.ones((3, 2))}, two)
    with pytest.raises(ValueError, match=r"relu: values and rows must have the shape"):
        relaxation_slack(single, {"relu": jnp.ones((4, 2))}, two)


# --- "Improved Training of Certifiably Robust Models" ---------------------------------------------


def _fast_lin(layers, x, eps, bounds, c):
    """Lower bounds on `c @ f`, the worst inputs, and the rows on each ReLU's output, in numpy.

    `p_t = c_t g(x) - eps ||c_t W_(L:1)||_1 - sum_i sum_(j in I_i) u l / (u - l) min(row_j, 0)`.
    """
    weight, bias = layers[len(bounds)]
    row, constant, rows = c @ weight, c @ bias, []
    for (lower, upper), (weight, bias) in zip(
        bounds[::-1], layers[: len(bounds)][::-1], strict=True
    ):
        rows.insert(0, row)
        unstable = (lower < 0) & (upper > 0)
        width = np.where(unstable, upper - lower, 1.0)
        slope = np.where(unstable, upper / width, (lower >= 0) * 1.0)
        offset = np.where(unstable, upper * lower / width, 0.0)
        constant = constant - np.minimum(row, 0) @ offset
        row = row * slope
        constant, row = constant + row @ bias, row @ weight
    return row @ x + constant - eps * np.abs(row).sum(axis=1), x - eps * np.sign(row), rows


def _relaxed(layers, x, eps, c):
    bounds = []
    for weight, _ in layers[:-1]:
        identity = np.eye(len(weight))
        below = _fast_lin(layers, x, eps, bounds, identity)[0]
        above = -_fast_lin(layers, x, eps, bounds, -identity)[0]
        bounds.append((below, above))
    return bounds, *_fast_lin(layers, x, eps, bounds, c)


def _slack(bounds, values, rows):
    """`r_t` by loops over units."""
    count = sum(int(((lower < 0) & (upper > 0)).sum()) for lower, upper in bounds)
    result = np.zeros(len(rows[0]))
    for t, ((lower, upper), value, row) in itertools.product(
        range(len(result)), zip(bounds, values, rows, strict=True)
    ):
        for j in range(len(lower)):
            if lower[j] < 0 < upper[j]:
                ends = abs(value[t, j] - lower[j]), abs(value[t, j] - upper[j])
                result[t] += abs(value[t, j]) if row[t, j] >= 0 else min(ends)
    return result / max(count, 1)


def _pre_activations(layers, x):
    values = []
    for weight, bias in layers[:-1]:
        values.append(x @ weight.T + bias)
        x = np.maximum(values[-1], 0)
    return values, x @ layers[-1][0].T + layers[-1][1]


@on_host
def _linear_aux(layers, x, eps, c):
    def network(x):
        for weight, bias in layers[:-1]:
            x = jax.nn.relu(weight @ x + bias)
        return layers[-1][0] @ x + layers[-1][1]

    _, aux = bj.linear(
        network,
        slopes="parallel",
        intermediate="linear",
        intersect=False,
        sides="lower",
        has_aux=True,
    )(bj.LpBall(x, eps), c)
    return aux.linear.lower, aux.worst_input, aux.pre_activations


_SLACK = on_host(relaxation_slack)


def _gap_and_slack(layers, x, eps, c):
    """`d` and `r` from the library's bounds, checked against numpy on the way."""
    margins, worst, pre_activations = _linear_aux(layers, x, eps, c)
    bounds, expected, at, rows = _relaxed(layers, x, eps, c)
    np.testing.assert_allclose(margins, expected, rtol=1e-10)
    np.testing.assert_allclose(worst, at, rtol=1e-10)
    for result, wanted in zip(pre_activations.values(), bounds, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-10)
    values, logits = _pre_activations(layers, worst)
    attained = np.einsum("tk,tk->t", c, logits)
    labels = list(pre_activations)
    arguments = pre_activations, *(dict(zip(labels, a, strict=True)) for a in (values, rows))
    slack = _SLACK(*arguments)
    np.testing.assert_allclose(slack, _slack(bounds, values, rows), rtol=1e-9, atol=1e-12)
    gap = gap_to_attained(margins, attained)
    np.testing.assert_allclose(gap, attained - expected, rtol=1e-9, atol=1e-12)
    return gap, slack, arguments


def test_gap_and_slack_of_fast_lin():
    with jax.enable_x64(True):
        c = np.array([[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]])
        kinds = np.zeros(2, int)
        for seed in range(8):
            layers = _layers(seed, (4, 6, 7, 3))
            x = np.random.default_rng(seed).normal(size=4)
            gap, slack, (bounds, _, rows) = _gap_and_slack(layers, x, 0.4, c)
            assert (gap >= 0).all()
            assert (slack > 0).all()  # a random net's relaxation is tight nowhere
            for label, (lower, upper) in bounds.items():
                unstable = (lower < 0) & (upper > 0)
                negative = rows[label] < 0
                kinds += [int((unstable & side).sum()) for side in (~negative, negative)]
        assert kinds.min() > 20  # both lines occur


def test_nets_without_unstable_units_have_no_gap_and_no_slack():
    with jax.enable_x64(True):
        layers = _layers(0, (4, 6, 7, 3))
        for k in range(2):
            signs = np.where(np.arange(len(layers[k][1])) % 3 == 0, -1.0, 1.0)
            layers[k] = layers[k][0], layers[k][1] + 30.0 * 3**k * signs
        c = np.array([[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]])
        gap, slack, (bounds, _, _) = _gap_and_slack(layers, np.ones(4), 0.4, c)
        lower, upper = (np.concatenate(ends) for ends in zip(*bounds.values(), strict=True))
        assert set(np.sign(lower) * np.sign(upper)) == {1.0}
        assert set(np.sign(lower)) == {-1.0, 1.0}
        np.testing.assert_allclose(gap, 0.0, atol=1e-10)
        assert not slack.any()


def test_a_tight_relaxation_has_no_slack():
    # Unstable units whose worst inputs lie on the relaxation: at 0 for the lower line (row >= 0),
    # at an end of the chord (row < 0).
    bounds = {"relu": bj.Interval(-np.ones(3), 2.0 * np.ones(3))}
    values = np.array([[0.0, -1.0, 2.0], [0.0, 0.0, 0.0], [np.nan, 0.0, 0.0]])
    rows = np.array([[1.0, -1.0, -1.0], [0.0, 1.0, -1.0], [1.0, 1.0, 1.0]])
    result = _SLACK(bounds, {"relu": values}, {"relu": rows})
    np.testing.assert_allclose(result, [0.0, 1 / 3, np.nan], rtol=1e-6)
    result = _SLACK(bounds, {"relu": np.zeros((3, 3))}, {"relu": values + 1.0})
    np.testing.assert_allclose(result, [0.0, 0.0, np.nan], rtol=1e-6)
    for bad in ((np.array([-1, -1, np.nan]), np.ones(3)), (-np.ones(3), np.array([1, 1, np.nan]))):
        nan = _SLACK({"relu": bj.Interval(*bad)}, {"relu": np.zeros((3, 3))}, {"relu": rows})
        assert np.isnan(nan).all()


def test_gradient_of_the_slack():
    @on_host
    def run(arguments):
        weights = jnp.array([1.0, 3.0])
        return jax.value_and_grad(lambda a: weights @ relaxation_slack(*a))(arguments)

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        bounds = {"a": bj.Interval(-rng.uniform(size=6), rng.uniform(size=6) - 0.2)}
        values, rows = ({"a": rng.uniform(-1, 1, size=(2, 6))} for _ in range(2))
        np.testing.assert_allclose(
            run((bounds, values, rows))[0],
            np.array([1, 3]) @ _slack(list(bounds.values()), [values["a"]], [rows["a"]]),
        )
        _gradients_are_finite_differences(run, (bounds, values, rows))
        _, gradient = run((bounds, values, rows))
        assert not np.any(gradient[2]["a"])
        # Bounds affect the chords only, so they have a gradient only there.
        at_chords = ((rows["a"] < 0) & (bounds["a"].upper > 0)).any(axis=0)
        assert 0 < at_chords.sum() < 6
        np.testing.assert_array_equal(np.any(gradient[0]["a"], axis=0), at_chords)
        # There is no slack where pre-activations lie on the relaxation.
        values = {"a": np.where(rows["a"] < 0, bounds["a"].lower, 0.0)}
        value, gradient = run((bounds, values, rows))
        assert value == 0
        assert not any(np.any(g) for g in jax.tree.leaves(gradient))
