"""Random slope policies and optimised slopes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import BY_NAME, bounds_function, on_host, random_box, values_function
from networks import points

import boundjax as bj
from boundjax.training import robust_cross_entropy

pytestmark = pytest.mark.quick

NARROW, LEANING_LEFT, LEANING_RIGHT = (-1e-3, 1e-3), (-2.0, 1.0), (-1.0, 2.0)


def relu_slopes(slopes, count=4000):
    """The slopes of `count` units that share one interval."""

    @on_host
    def run(low, high):
        box = bj.Box(jnp.full((count,), low), jnp.full((count,), high))
        transform = bj.linear(jax.nn.relu, slopes=slopes, has_aux=True)
        return transform(box, jnp.ones((1, count), jnp.float32))[1].slopes["relu"]

    return run


@pytest.mark.parametrize(("p", "q"), [(0.0, 1.0), (0.0, 0.0), (1.0, 1.0), (0.3, 0.6)])
def test_random_slopes_have_their_probabilities(p, q):
    slopes_over = relu_slopes(bj.slopes.random(p, q, jax.random.key(0)))
    for interval, probability in ((LEANING_LEFT, p), (LEANING_RIGHT, q), (NARROW, q)):
        slopes = slopes_over(*map(np.float32, interval))
        assert set(np.unique(slopes)) <= {0.0, 1.0}
        assert abs(slopes.mean() - probability) <= 0.03 * (0 < probability < 1)


def test_random_slopes_with_certain_ends_are_the_named_policies():
    box = bj.Box(-jnp.linspace(0.1, 1.0, 7), jnp.linspace(0.9, 0.2, 7))
    key = jax.random.key(0)
    for name, (p, q) in {"adaptive": (0, 1), "zero": (0, 0), "one": (1, 1)}.items():
        drawn = bj.slopes.random(p, q, key)

        @jax.jit
        def both(box, policies=(name, drawn)):
            return [
                bj.linear(lambda x: jax.nn.relu(x) - 0.5 * x, slopes=policy)(box)
                for policy in policies
            ]

        expected, ours = both(box)
        np.testing.assert_array_equal(ours.lower, expected.lower)


def test_uniform_slopes_differ_by_op_and_key_and_repeat():
    def function(x):
        return jax.nn.relu(1.0 - jax.nn.relu(x))

    def slopes(key):
        policy = bj.slopes.uniform(key)
        _, aux = bj.linear(function, slopes=policy, has_aux=True)(
            bj.Box(-jnp.ones(500), jnp.ones(500)), jnp.ones((1, 500), jnp.float32)
        )
        return aux.slopes

    first, again, other = (on_host(slopes)(jax.random.key(k)) for k in (0, 0, 1))
    assert len(first) == 2
    for label, value in first.items():
        assert 0 <= value.min() < 0.05
        assert 0.95 < value.max() <= 1
        np.testing.assert_array_equal(value, again[label])
        assert (value != other[label]).mean() > 0.99
    one, two = first.values()
    assert (one != two).mean() > 0.99


# --- optimised slopes -----------------------------------------------------------------------------

RULES = {
    "sign": {},
    "sign per row": {"per_spec": True},
    "adam": {"rule": optax.adam(0.3), "per_spec": True},
    "adam shared": {"rule": optax.adam(0.3), "start": 0.5},
}


@functools.cache
def optimised(name: str, rule: str, steps: int, intermediate: str, optimize_intermediate: bool):
    network = BY_NAME[name]

    @on_host
    def run(weights, lower, upper):
        slopes = bj.optimized(steps, **RULES[rule], optimize_intermediate=optimize_intermediate)
        flat = functools.partial(network.flat, weights)
        return bj.linear(flat, slopes=slopes, intermediate=intermediate)(bj.Box(lower, upper))

    return run


# Rules and ops are independent of each other, so one network runs with all rules, and the others
# with one rule of each kind.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *[("mlp", rule) for rule in RULES],
        *[("cnn", "adam"), ("residual", "sign per row"), ("clipped", "sign")],
        *[("leaky", "adam shared"), ("clipped", "adam"), ("leaky", "sign per row")],
    ],
)
def test_more_steps_are_never_looser_and_all_are_sound(name, rule):
    network = BY_NAME[name]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 3, 1.0)
        inputs = points(np.random.default_rng(3), lower, upper)
        outputs = values_function(network)(weights, jnp.asarray(inputs))
        previous, widths = None, []
        for steps in (0, 1, 6):
            bounds = optimised(name, rule, steps, "interval", False)(weights, lower, upper)
            assert (outputs >= bounds.lower - 1e-10).all()
            assert (outputs <= bounds.upper + 1e-10).all()
            if previous is not None:
                assert (bounds.lower >= previous.lower - 1e-10).all()
                assert (bounds.upper <= previous.upper + 1e-10).all()
            previous = bounds
            widths.append(bounds.width.sum())
        assert widths[2] < widths[0]


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.sampled(3)
def test_optimised_bounds_are_ordered(name):
    """CROWN, then optimised slopes alone, then optimised intermediate bounds as well."""
    network = BY_NAME[name]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 5, 0.8)
        crown = bounds_function(network, "crown")(weights, lower, upper)
        fixed = optimised(name, "adam", 12, "linear", False)(weights, lower, upper)
        full = optimised(name, "adam", 12, "linear", True)(weights, lower, upper)
        outputs = values_function(network)(
            weights, jnp.asarray(points(np.random.default_rng(5), lower, upper))
        )
        assert (outputs >= full.lower - 1e-10).all()
        assert (outputs <= full.upper + 1e-10).all()
        # The optimiser starts at CROWN's own slopes.
        assert (fixed.lower >= crown.lower - 1e-10).all()
        assert (fixed.upper <= crown.upper + 1e-10).all()
        assert full.width.sum() < fixed.width.sum() < crown.width.sum()


@pytest.mark.slow
def test_a_small_byte_budget_gives_the_same_optimised_bounds():
    network = BY_NAME["cnn"]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 0, 0.3)
        slopes = bj.optimized(1, optax.sgd(0.1), per_spec=True, optimize_intermediate=True)
        results = [
            jax.jit(
                bj.linear(
                    functools.partial(network.apply, weights),
                    slopes=slopes,
                    intermediate="linear",
                    max_bytes=budget,
                )
            )(bj.Box(lower, upper))
            for budget in (2**30, 2**14)
        ]
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


def test_one_step_is_the_papers_method():
    """Lee et al. 2021: slopes a0, one signed gradient step of the loss, a second pass."""
    network = BY_NAME["mlp"]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 1, 0.4)
        flat, box = functools.partial(network.flat, weights), bj.Box(lower, upper)
        specification = bj.margin_specification(jnp.asarray(0), 3, dtype=jnp.float64)
        slopes = bj.optimized(objective=robust_cross_entropy)

        @on_host
        def run():
            labels = bj.linear(flat, has_aux=True)(box)[1].slopes
            half = {label: jnp.full_like(slope, 0.5) for label, slope in labels.items()}

            def loss(slopes):
                transform = bj.linear(flat, slopes=slopes, sides="lower", has_aux=True)
                bounds, aux = transform(box, specification)
                return robust_cross_entropy(aux.linear.lower), bounds.lower

            (at_half, low), gradient = jax.value_and_grad(loss, has_aux=True)(half)
            moved = jax.tree.map(lambda a, g: jnp.clip(a - 2.0 * jnp.sign(g), 0, 1), half, gradient)
            at_moved, moved_low = loss(moved)
            bounds, aux = bj.linear(flat, slopes=slopes, sides="lower", has_aux=True)(
                box, specification
            )
            return (at_half, at_moved), moved, (low, moved_low), bounds.lower, aux.slopes

        (at_half, at_moved), moved, seen, bound, chosen = run()
    assert at_moved < at_half
    for label, expected in moved.items():
        np.testing.assert_array_equal(chosen[label], expected)
    np.testing.assert_allclose(bound, np.maximum(*seen), rtol=1e-12)


def test_slopes_are_constants_for_outer_gradients():
    network = BY_NAME["mlp"]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 2, 0.4)
        box = bj.Box(lower, upper)
        specification = bj.margin_specification(jnp.asarray(0), 3, dtype=jnp.float64)

        def bound(weights, slopes):
            flat = functools.partial(network.flat, weights)
            _, aux = bj.linear(flat, slopes=slopes, sides="lower", has_aux=True)(box, specification)
            return aux.linear.lower.sum(), aux.slopes

        @jax.jit
        def gradients(weights):
            gradient = jax.grad(bound, has_aux=True)
            ours, chosen = gradient(weights, bj.optimized(2))
            return ours, gradient(weights, jax.lax.stop_gradient(chosen))[0]

        ours, expected = gradients(weights)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_optimised_bounds_under_vmap_with_keys():
    network = BY_NAME["mlp"]
    weights = network.weights(0)
    centres = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)

    def bounds(x, key):
        slopes = bj.optimized(start=bj.slopes.uniform(key))
        return bj.linear(functools.partial(network.flat, weights), slopes=slopes)(bj.LpBall(x, 0.2))

    keys = jax.random.split(jax.random.key(0), 3)
    batched, alone = jax.jit(jax.vmap(bounds))(centres, keys), jax.jit(bounds)
    for k in range(3):
        single = alone(centres[k], keys[k])
        np.testing.assert_allclose(batched.lower[k], single.lower, rtol=1e-5, atol=1e-5)


def test_nan_weights_give_no_optimised_bound():
    network = BY_NAME["mlp"]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 2, 0.4)
        weights[1]["kernel"] = weights[1]["kernel"].at[0].set(jnp.nan)
        for steps in (1, 6):
            bounds = optimised("mlp", "adam", steps, "interval", False)(weights, lower, upper)
            assert not np.isfinite(bounds.lower).any()
            assert not np.isfinite(bounds.upper).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bj.optimized(-1), "steps must be >= 0, got -1"),
        (lambda: bj.optimized(rule="sgn"), "rule must be 'sign' or an optax optimizer, got 'sgn'"),
        (lambda: bj.optimized(rule=optax.sgd(0.1), learning_rate=0.1), "has its own"),
        (lambda: bj.optimized(per_spec=True, objective=jnp.sum), "every row has its own"),
        (lambda: bj.optimized(start="half"), "slopes must be one of .* got 'half'"),
        (lambda: bj.optimized(start=2.0), r"number in \[0, 1\], got 2.0"),
        (lambda: bj.slopes.random(1.5, 0, jax.random.key(0)), r"probability in \[0, 1\], got 1.5"),
        (
            lambda: bj.linear(jax.nn.relu, slopes=bj.optimized(optimize_intermediate=True)),
            "optimize_intermediate needs intermediate='linear', got .*'interval'",
        ),
    ],
)
def test_bad_options_give_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
