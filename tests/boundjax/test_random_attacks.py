"""FGSM, and attacks on random networks: expectation over transformation, transfer between draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import boundjax as bj
from boundjax.attacks import Descent, expected_gradient, fgsm, pgd, transfer_accuracy
from boundjax.training import cross_entropy

pytestmark = pytest.mark.quick

KEY = jax.random.key(0)
NORMS = [2, jnp.inf]
LOSSES = ["margin", "cross_entropy"]
CLIP = (0.0, 1.0)
WEIGHTS = [
    jax.random.normal(key, s)
    for key, s in zip(jax.random.split(jax.random.key(3)), [(6, 8), (8, 4)], strict=True)
]
X = jax.random.uniform(jax.random.key(4), (5, 2, 3))


def network(x, first, second):
    return jnp.tanh(x.reshape(len(x), -1) @ first) @ second


def random_network(std):
    """A two-layer network whose weights are Gaussian."""

    def f(x, key):
        keys = jax.random.split(key)
        drawn = [
            w + std * jax.random.normal(k, w.shape) for w, k in zip(WEIGHTS, keys, strict=True)
        ]
        return network(x, *drawn)

    return f


def deterministic(x):
    return network(x, *WEIGHTS)


LABELS = jnp.argmax(deterministic(X), axis=-1).astype(jnp.int32)


def sizes(attacked, norm):
    return np.linalg.norm(np.asarray(attacked - X).reshape(len(X), -1), ord=norm, axis=-1)


@functools.cache
def compiled(std, norm, loss, draws, keep=None, steps=3, restarts=1):
    f = deterministic if std is None else random_network(std)
    options = {"norm": norm, "clip": CLIP, "loss": loss, "steps": steps, "restarts": restarts}
    return jax.jit(
        lambda key, eps: pgd(f, X, LABELS, eps, key=key, draws=draws, keep=keep, **options)
    )


def test_deterministic_networks_are_attacked_as_before():
    """Points that `pgd` found before it knew of draws; equal up to the rounding of a machine."""
    keys = jax.random.split(jax.random.key(3), 3)
    first, second = jax.random.normal(keys[0], (6, 16)), jax.random.normal(keys[1], (16, 4))
    x = jax.random.uniform(keys[2], (6, 2, 3))
    labels = jnp.argmax(network(x, first, second), axis=-1).astype(jnp.int32)
    expected = {
        2: [0.16936688, 0.33353275, 0.26126692, 0.704405, 0.0, 0.8212344],
        jnp.inf: [0.0783395, 0.25959402, 0.21360545, 0.6372251, 0.0, 0.7422814],
    }
    for norm, points in expected.items():
        attacked = pgd(
            *(lambda x: network(x, first, second), x, labels, 0.2),
            **{"key": KEY, "norm": norm, "clip": CLIP, "steps": 7, "restarts": 3},
        )
        np.testing.assert_allclose(attacked[:, 0, 0], points, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_is_one_step_as_long_as_the_radius(norm):
    eps = 0.1
    attacked = fgsm(deterministic, X, LABELS, eps, norm=norm, clip=CLIP)
    g = np.asarray(jax.grad(lambda x: cross_entropy(deterministic(x), LABELS).sum())(X))
    lengths = np.sqrt(np.sum(g**2, axis=(1, 2), keepdims=True))
    step = np.sign(g) if norm == jnp.inf else g / lengths
    np.testing.assert_allclose(attacked, np.clip(X + eps * step, *CLIP), rtol=1e-5, atol=1e-6)
    unclipped = fgsm(deterministic, X, LABELS, eps, norm=norm)
    np.testing.assert_allclose(sizes(unclipped, norm), eps, rtol=1e-4)


def test_fgsm_leaves_an_input_of_logits_that_are_no_numbers():
    attacked = fgsm(lambda x: jnp.full((len(x), 4), jnp.nan) * x.sum(), X, LABELS, 0.1)
    np.testing.assert_array_equal(attacked, X)


@given(
    seed=st.integers(0, 2**31 - 1),
    std=st.floats(0.0, 2.0, width=32),
    draws=st.integers(1, 4),
    loss=st.sampled_from(LOSSES),
)
def test_the_expected_gradient_is_the_mean_of_the_gradients(seed, std, draws, loss):
    key, f = jax.random.key(seed), random_network(std)
    result = expected_gradient(f, X, LABELS, key=key, draws=draws, loss=loss)

    def objective(x, key):
        logits = f(x, key)
        if loss == "cross_entropy":
            return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(len(x)), LABELS])
        own = logits[jnp.arange(len(x)), LABELS]
        others = jnp.where(jnp.arange(4)[None] == LABELS[:, None], -jnp.inf, logits)
        return jnp.sum(own - others.max(-1))

    gradients = [jax.grad(objective)(X, k) for k in jax.random.split(key, draws)]
    scale = np.abs(gradients).max() + 1e-6
    np.testing.assert_allclose(result, np.mean(gradients, axis=0), atol=1e-5 * scale)


@pytest.mark.slow
def test_the_expected_gradient_of_a_linear_network_tends_to_that_of_the_mean_weights():
    """Golden (a) of linear networks: the error falls as `s / sqrt(n)`."""
    mean, s = jax.random.normal(jax.random.key(1), (6, 2)), 0.5
    labels = jnp.zeros(len(X), jnp.int32)

    def f(x, key):
        return x.reshape(len(x), -1) @ (mean + s * jax.random.normal(key, mean.shape))

    exact = mean[:, 0] - mean[:, 1]  # of the margin

    def error(draws):
        keys = jax.random.split(KEY, 20)
        options = {"draws": draws, "loss": "margin"}
        result = [expected_gradient(f, X, labels, key=k, **options)[0].ravel() for k in keys]
        return np.sqrt(np.mean((np.asarray(result) - np.asarray(exact)) ** 2))

    # The difference of two columns has the variance 2 s^2.
    for draws in (4, 64):
        np.testing.assert_allclose(error(draws), s * np.sqrt(2 / draws), rtol=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("norm", "draws"), [(jnp.inf, 1), (jnp.inf, 4), (2, 1), (2, 2)])
def test_without_deviation_eot_is_pgd_bit_for_bit(norm, draws, loss, keep):
    random = compiled(0.0, norm, loss, draws, keep, restarts=2)(KEY, 0.2)
    plain = compiled(None, norm, loss, None, keep, restarts=2)(KEY, 0.2)
    np.testing.assert_array_equal(random, plain)
    if keep == "best":
        assert np.abs(np.asarray(random - X)).max() > 0.01


def test_opposite_draws_leave_the_input():
    """Golden (c): two draws with opposite gradients; the sign of 0 is 0."""

    def f(x, key):
        sign = 2.0 * jax.random.bernoulli(key).astype(x.dtype) - 1.0
        return sign * (x.reshape(len(x), -1) @ WEIGHTS[0][:, :4])

    def signs(key):
        return [bool(jax.random.bernoulli(k)) for k in jax.random.split(key, 2)]

    keys = [jax.random.key(seed) for seed in range(20)]
    opposite = next(key for key in keys if sum(signs(key)) == 1)
    equal = next(key for key in keys if sum(signs(key)) == 2)
    for norm in NORMS:
        options = {"draws": 2, "loss": "margin", "norm": norm}
        # With two classes, the margin of the negated logits is the negated margin.
        two = functools.partial(lambda x, key: f(x, key)[:, :2])
        labels = jnp.zeros(len(X), jnp.int32)
        np.testing.assert_array_equal(fgsm(two, X, labels, 0.1, key=opposite, **options), X)
        moved = fgsm(two, X, labels, 0.1, key=equal, **options)
        assert np.abs(np.asarray(moved - X)).max() > 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_one_draw_of_a_fixed_key_is_pgd_on_that_draw(norm):
    f, fixed = random_network(0.5), jax.random.key(7)
    options = {"key": KEY, "norm": norm, "steps": 4, "loss": "cross_entropy"}
    on_draw = pgd(lambda x: f(x, fixed), X, LABELS, 0.2, keep="last", **options)
    of_fixed = pgd(lambda x, key: f(x, fixed), X, LABELS, 0.2, draws=1, **options)
    np.testing.assert_array_equal(of_fixed, on_draw)


@pytest.mark.parametrize("norm", NORMS)
def test_every_step_follows_new_draws(norm):
    """EOT-PGD a second time, step by step, with the keys that `Descent` states."""
    f, steps, draws, eps = random_network(0.5), 3, 2, 0.2
    attacked = compiled(0.5, norm, "cross_entropy", draws, steps=steps)(KEY, eps)
    descent = Descent(f, X, LABELS, bj.Threat(eps), draws=draws)
    keys = descent.draw_keys(KEY, 0, steps)
    assert len({tuple(k.tolist()) for k in jax.random.key_data(keys)}) == steps + 1
    points = np.asarray(X)
    for key in keys[:-1]:
        g = np.mean(
            [
                jax.grad(lambda x, k=k: cross_entropy(f(x, k), LABELS).sum())(jnp.asarray(points))
                for k in jax.random.split(key, draws)
            ],
            axis=0,
        )
        length = np.sqrt(np.sum(g**2, axis=(1, 2), keepdims=True))
        moved = points + eps / 4 * (np.sign(g) if norm == jnp.inf else g / length) - np.asarray(X)
        if norm == jnp.inf:
            moved = np.clip(moved, -eps, eps)
        else:
            length = np.sqrt(np.sum(moved**2, axis=(1, 2), keepdims=True))
            moved = moved * np.minimum(1, eps / length)
        points = np.clip(np.asarray(X) + moved, *CLIP)
    np.testing.assert_allclose(attacked, points, atol=1e-5)


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("norm", NORMS)
def test_points_stay_in_the_set_and_depend_on_the_key_alone(norm, keep):
    attack = compiled(0.5, norm, "margin", 2, keep, restarts=2)
    for eps in (0.0, 0.05, 0.6):
        attacked = np.asarray(attack(KEY, eps))
        assert np.all(sizes(attacked, norm) <= eps * (1 + 1e-5))
        assert attacked.min() >= 0.0
        assert attacked.max() <= 1.0
        np.testing.assert_array_equal(attacked, attack(KEY, eps))
    assert np.any(attacked != np.asarray(attack(jax.random.key(1), eps)))
    one = fgsm(random_network(0.5), X, LABELS, 0.3, key=KEY, norm=norm, clip=CLIP, draws=2)
    assert np.all(sizes(one, norm) <= 0.3 * (1 + 1e-5))


def test_exact_eot_gains_more_than_random_signs():
    """Golden (e): the expected loss of a linear network, whose mean gradient is known exactly."""
    f, eps = random_network(0.2), 0.05
    keys = jax.random.split(jax.random.key(11), 200)

    @jax.jit
    def expected_loss(x):
        return jnp.mean(jax.vmap(lambda key: cross_entropy(f(x, key), LABELS).mean())(keys))

    by_eot = expected_loss(fgsm(f, X, LABELS, eps, key=KEY, draws=200))
    signs = jax.random.rademacher(KEY, (20, *X.shape), X.dtype)
    by_chance = np.mean([expected_loss(X + eps * sign) for sign in signs])
    assert by_eot > by_chance + 0.01


def test_either_iterate_that_is_kept_has_smaller_mean_margins():
    f = random_network(0.3)
    last, best = (
        compiled(0.3, jnp.inf, "margin", 8, keep, steps=8)(KEY, 0.3) for keep in ("last", "best")
    )
    fresh = jax.random.split(jax.random.key(2), 300)

    @jax.jit
    def margins(x):
        def one(key):
            logits = f(x, key)
            own = logits[jnp.arange(len(x)), LABELS]
            return own - jnp.where(jax.nn.one_hot(LABELS, 4) > 0, -jnp.inf, logits).max(-1)

        return jnp.mean(jax.vmap(one)(fresh), axis=0)

    clean = np.asarray(margins(X))
    for points in (last, best):
        assert np.all(np.asarray(margins(points)) < clean)


def test_accuracy_of_each_draw_on_the_points_found_for_each_other_draw():
    f, draws, attack = random_network(0.6), 3, functools.partial(pgd, eps=0.15, steps=3)
    matrix = jax.jit(lambda key: transfer_accuracy(f, X, LABELS, attack, key=key, draws=draws))
    result = np.asarray(matrix(KEY))
    of_draws, of_attacks = (jax.random.split(each, draws) for each in jax.random.split(KEY))
    for i in range(draws):
        points = attack(lambda x, i=i: f(x, of_draws[i]), X, LABELS, key=of_attacks[i])
        for j in range(draws):
            right = np.asarray(jnp.argmax(f(points, of_draws[j]), axis=-1) == LABELS)
            np.testing.assert_allclose(result[i, j], right.mean(), atol=1e-6)
    assert result.min() < result.max()


def test_without_deviation_attacks_transfer_completely():
    attack = functools.partial(fgsm, eps=0.5)
    result = transfer_accuracy(random_network(0.0), X, LABELS, attack, key=KEY, draws=2)
    assert np.all(np.asarray(result) == np.asarray(result)[0, 0])
    assert float(result[0, 0]) < 1.0


def two(x, key):
    return network(x, *WEIGHTS)


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (pgd, {"draws": 0}, r"draws must be an integer >= 1, got 0"),
        (pgd, {"draws": 2.0}, r"draws must be an integer >= 1, got 2\.0"),
        (pgd, {}, r"f takes a batch and a PRNG key: give pgd draws=n"),
        (fgsm, {}, r"f takes a batch and a PRNG key: give fgsm draws=n"),
        (fgsm, {"draws": 3, "key": None}, r"fgsm with draws expects a PRNG key, got None"),
        (pgd, {"draws": 3, "f": deterministic}, r"pgd with draws expects f\(x, key\), got a func"),
        (pgd, {"draws": 3, "keep": "first"}, r"keep must be 'best' or 'last', got 'first'"),
        (fgsm, {"draws": 3, "loss": "hinge"}, r"unknown loss 'hinge'"),
        (fgsm, {"draws": 3, "norm": 1}, r"fgsm expects norm=2 or norm=inf, got norm=1"),
        (fgsm, {"draws": 3, "eps": -1.0}, r"eps must be >= 0, got -1\.0"),
        (fgsm, {"draws": 3, "f": lambda x, key: x}, r"fgsm expects f to return logits \[B, C\]"),
    ],
)
def test_bad_arguments_are_one_line_errors(attack, settings, message):
    arguments = {"f": two, "x": X, "labels": LABELS, "eps": 0.1, "key": KEY} | settings
    with pytest.raises(ValueError, match=message) as caught:
        attack(**arguments)
    assert "\n" not in str(caught.value)


def test_a_module_without_a_key_is_a_one_line_error():
    module = bj.stochastic.GaussianNoise(0.1)
    pure = bj.PureModel.of((module, {}))
    f = functools.partial(pure.apply, pure.variables)
    x = X.reshape(len(X), -1)
    with pytest.raises(ValueError, match="GaussianNoise draws random numbers and got") as caught:
        pgd(f, x, LABELS, 0.1, key=KEY)
    assert "\n" not in str(caught.value)
    assert pgd(f, x, LABELS, 0.1, key=KEY, draws=2, steps=1).shape == x.shape


def test_transfer_and_expected_gradients_need_draws():
    with pytest.raises(ValueError, match="draws must be an integer >= 1"):
        transfer_accuracy(two, X, LABELS, functools.partial(fgsm, eps=0.1), key=KEY, draws=0)
    with pytest.raises(ValueError, match="draws must be an integer >= 1"):
        expected_gradient(two, X, LABELS, key=KEY, draws=-1)
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        expected_gradient(two, X, LABELS, key=KEY, draws=1, loss="hinge")
