import jax
import jax.numpy as jnp
import numpy as np
import pytest

from boundjax.attacks import pgd

pytestmark = pytest.mark.quick

KEY = jax.random.key(0)
NORMS = [2, jnp.inf]
CASES = [(norm, loss) for norm in NORMS for loss in ("margin", "cross_entropy")]


def _problem(batch=6, classes=4):
    """A smooth two-layer network on `[B, 2, 3]` inputs in `[0, 1]`."""
    keys = jax.random.split(jax.random.key(3), 3)
    first = jax.random.normal(keys[0], (6, 16))
    second = jax.random.normal(keys[1], (16, classes))
    x = jax.random.uniform(keys[2], (batch, 2, 3))

    def f(x):
        return jnp.tanh(x.reshape(x.shape[0], -1) @ first) @ second

    return f, x, jnp.argmax(f(x), axis=-1).astype(jnp.int32)


def _margins(logits, labels):
    logits, labels = np.asarray(logits), np.asarray(labels)
    own = logits[np.arange(len(labels)), labels]
    others = np.where(np.arange(logits.shape[1])[None] == labels[:, None], -np.inf, logits)
    return own - others.max(-1)


@pytest.mark.parametrize(("norm", "loss"), CASES)
def test_stays_in_the_ball_and_the_clip_box_and_improves(norm, loss):
    f, x, labels = _problem()
    attack = jax.jit(
        lambda x, eps: pgd(
            f, x, labels, eps, key=KEY, norm=norm, clip=(0.0, 1.0), steps=20, restarts=3, loss=loss
        )
    )
    for eps in (0.01, 0.3):
        attacked = np.asarray(attack(x, eps))
        offset = (attacked - np.asarray(x)).reshape(len(x), -1)
        size = np.linalg.norm(offset, ord=norm, axis=-1)
        assert np.all(size <= eps * (1 + 1e-5))
        assert attacked.min() >= 0.0
        assert attacked.max() <= 1.0
        before, after = _margins(f(x), labels), _margins(f(attacked), labels)
        assert np.all(after <= before)
        assert after.mean() < before.mean() - 0.5 * eps
    assert np.all(np.isfinite(attacked))


@pytest.mark.parametrize("norm", NORMS)
def test_finds_the_optimum_of_a_linear_model(norm):
    weights = jax.random.normal(jax.random.key(5), (12, 2))
    x = jax.random.normal(jax.random.key(6), (8, 3, 4))
    labels = jnp.zeros(8, jnp.int32)

    def f(x):
        return x.reshape(x.shape[0], -1) @ weights

    attacked = pgd(f, x, labels, 0.25, key=KEY, norm=norm)
    direction = np.asarray(weights[:, 0] - weights[:, 1])
    dual = np.linalg.norm(direction, ord=1 if norm == jnp.inf else 2)
    expected = _margins(f(x), labels) - 0.25 * dual
    np.testing.assert_allclose(_margins(f(attacked), labels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_radius_zero_returns_the_input(norm):
    f, x, labels = _problem()
    attacked = pgd(f, x, labels, 0.0, key=KEY, norm=norm, restarts=2, clip=(0.0, 1.0))
    np.testing.assert_array_equal(attacked, x)


def test_no_steps_keep_the_best_start():
    f, x, labels = _problem()
    np.testing.assert_array_equal(pgd(f, x, labels, 0.1, key=KEY, steps=0), x)
    attacked = pgd(f, x, labels, 0.1, key=KEY, steps=0, restarts=20)
    assert np.all(_margins(f(attacked), labels) <= _margins(f(x), labels))
    assert np.any(np.asarray(attacked) != np.asarray(x))


def test_more_restarts_are_never_worse():
    f, x, labels = _problem()
    margins = [
        _margins(f(pgd(f, x, labels, 0.5, key=KEY, steps=5, restarts=n)), labels) for n in (1, 4)
    ]
    assert np.all(margins[1] <= margins[0])


def test_is_pure_and_depends_on_the_key_only_through_random_starts():
    f, x, labels = _problem()
    one = pgd(f, x, labels, 0.2, key=KEY, steps=3)
    np.testing.assert_array_equal(one, pgd(f, x, labels, 0.2, key=jax.random.key(9), steps=3))
    starts = [
        pgd(f, x, labels, 0.2, key=jax.random.key(seed), steps=0, restarts=3) for seed in (0, 9)
    ]
    assert np.any(np.asarray(starts[0]) != np.asarray(starts[1]))


def test_nan_logits_leave_the_input():
    _, x, labels = _problem()
    attacked = pgd(lambda x: jnp.full((len(x), 4), jnp.nan), x, labels, 0.1, key=KEY)
    np.testing.assert_array_equal(attacked, x)


def test_flat_regions_do_not_divide_by_zero():
    _, x, labels = _problem()
    flat = pgd(lambda x: jnp.zeros((len(x), 4)) + 0.0 * x.sum(), x, labels, 0.1, key=KEY, norm=2)
    assert np.all(np.isfinite(flat))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -0.1}, r"eps must be >= 0, got -0\.1"),
        ({"eps": float("nan")}, r"eps must be >= 0, got nan"),
        ({"eps": jnp.zeros(3)}, r"scalar eps, got shape \(3,\)"),
        ({"norm": 1}, r"expects norm=2 or norm=inf, got norm=1"),
        ({"loss": "hinge"}, r"unknown loss 'hinge': use one of margin, cross_entropy"),
        ({"steps": -1}, r"steps >= 0 and restarts >= 1"),
        ({"restarts": 0}, r"steps >= 0 and restarts >= 1"),
        ({"clip": (1.0, 0.0)}, r"lowest <= highest"),
        ({"labels": jnp.zeros(3, jnp.int32)}, r"x \[B, \.\.\.\] and labels \[B\]"),
        ({"f": lambda x: x}, r"logits \[B, C\].*got shape \(6, 2, 3\)"),
        ({"f": lambda x: x[:, 0, :1]}, r"C >= 2"),
        ({"x": jnp.zeros((6, 2), jnp.int32)}, r"floating-point"),
    ],
)
def test_bad_arguments_are_one_line_errors(settings, message):
    f, x, labels = _problem()
    arguments = {"f": f, "x": x, "labels": labels, "eps": 0.1, "key": KEY} | settings
    with pytest.raises(ValueError, match=message) as caught:
        pgd(**arguments)
    assert "\n" not in str(caught.value)
