"""l2 bounds against exact minima and attacks, at the ball's border, and their memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import BY_NAME, on_host
from l2_optimum import exact_minima, forward, sphere

import boundjax as bj
from boundjax.training.losses import robust_cross_entropy

METHODS = {
    "bcp": bj.lipschitz,
    "lmt": functools.partial(bj.lipschitz, box=False),
    "interval": bj.interval,
    "crown": functools.partial(bj.linear, intermediate="linear"),
}
EPS = 0.5
NETS = 8
CLIP = (-0.6, 0.7)


def draw(seed: int, widths: tuple[int, ...]):
    """Layers with PyTorch's initialisation, but larger, and an input in the clip range; float64."""
    rng = np.random.default_rng(seed)
    layers = [
        (rng.uniform(-2, 2, size=s) * np.sqrt(3.0 / s[0]), rng.uniform(-1, 1, size=s[1]))
        for s in itertools.pairwise(widths)
    ]
    return layers, rng.uniform(*CLIP, size=widths[0])


def network(layers, x: jax.Array) -> jax.Array:
    for kernel, bias in layers[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ layers[-1][0] + layers[-1][1]


def margin_rows(logits: jax.Array) -> jax.Array:
    return bj.margin_specification(jnp.argmax(logits), logits.size, dtype=logits.dtype)


@functools.cache
def margins_of(methods: tuple[str, ...], clip: tuple[float, float] | None):
    """`(layers, center, eps) -> (rows, {method: Interval of the margins})`, compiled."""

    @on_host
    def run(layers, center, eps):
        function = functools.partial(network, layers)
        rows, ball = margin_rows(function(center)), bj.LpBall(center, eps, p=2, clip=clip)
        return rows, {name: METHODS[name](function)(ball, rows) for name in methods}

    return run


@pytest.fixture(
    scope="module",
    params=[((2, 6, 3), None), ((2, 6, 3), CLIP), ((3, 4, 4, 3), None), ((3, 4, 4, 3), CLIP)],
    ids=["shallow", "shallow, clip", "deep", "deep, clip"],
)
def margins(request):
    """`{name: [nets, margins]}`: lower bounds, exact minima, and the least of many samples."""
    widths, clip = request.param
    results = {name: [] for name in (*METHODS, "exact", "sampled")}
    for seed in range(NETS):
        layers, center = draw(seed, widths)
        with jax.enable_x64(True):
            rows, bounds = margins_of(tuple(METHODS), clip)(layers, center, EPS)
        for name, (lower, _) in bounds.items():
            results[name].append(lower)
        results["exact"].append(exact_minima(layers, center, EPS, rows, clip))
        rng = np.random.default_rng(seed)
        sizes = np.minimum(rng.uniform(0, 2, size=(20_000, 1)), 1.0)  # half of them 1
        points = center + EPS * sizes * sphere(rng, 20_000, widths[0])
        if clip is not None:
            points = np.clip(points, *clip)  # nearer to the centre, which lies in the range
        results["sampled"].append((forward(layers, points) @ rows.T).min(0))
    return {name: np.array(values) for name, values in results.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled(7)
def test_no_bound_exceeds_the_optimum_over_the_ball(method, margins):
    assert (margins[method] <= margins["exact"] + 1e-9).all()


def test_the_optimum_is_no_larger_than_any_sample_and_near_the_least(margins):
    assert (margins["exact"] <= margins["sampled"] + 1e-9).all()
    assert (margins["sampled"] - margins["exact"]).max() < 0.1


def test_ball_and_box_are_no_looser_than_ball_or_box(margins):
    assert (margins["bcp"] >= margins["lmt"] - 1e-9).all()
    assert (margins["bcp"] >= margins["interval"] - 1e-9).all()


@pytest.mark.parametrize("clip", [None, CLIP])
def test_a_linear_network_is_bounded_exactly(clip):
    # Without a nonlinear op nothing is lost: the input set is the ball cut to the clip range.
    for seed in range(NETS):
        layers, center = draw(seed, (3, 4))
        with jax.enable_x64(True):
            rows, bounds = margins_of(("bcp", "lmt"), clip)(layers, center, EPS)
        exact = exact_minima(layers, center, EPS, rows, clip)
        np.testing.assert_allclose(bounds["bcp"].lower, exact, rtol=0, atol=1e-9)
        most = -exact_minima(layers, center, EPS, -rows, clip)
        np.testing.assert_allclose(bounds["bcp"].upper, most, rtol=0, atol=1e-9)


@pytest.mark.parametrize("box", [False, True])
def test_active_units_behind_a_rotation_are_bounded_exactly(box):
    # The image of the ball is a ball, and no ReLU changes it.
    @on_host
    def run(layers, center, norms):
        function = functools.partial(network, layers)
        rows, ball = margin_rows(function(center)), bj.LpBall(center, EPS, p=2)
        bounds = (bj.lipschitz(function, box=box, norms=n) for n in (norms, None))
        return rows, [b(ball, rows).lower for b in bounds]

    for seed in range(NETS):
        (first, last), center = draw(seed, (3, 3, 3))
        rotation = np.linalg.qr(first[0])[0]
        layers = [(rotation, EPS + 0.1 - center @ rotation), last]
        norms = {"dot_general": np.float64(1.0), "dot_general_1": np.linalg.norm(last[0], 2)}
        with jax.enable_x64(True):
            rows, (lower, by_default) = run(layers, center, norms)
        exact = exact_minima(layers, center, EPS, rows)
        np.testing.assert_allclose(lower, exact, rtol=0, atol=1e-9)
        # The default norms are bounds: three equal singular values cost a factor 3 ** (1 / 4096).
        spread = rows @ forward(layers, center) - exact
        assert (by_default <= exact + 1e-9).all()
        assert (by_default >= exact - 3e-4 * spread).all()


# ------------------------------------------------------------------ attacks and the sphere


@functools.cache
def bounds_and_values(name: str, clip: tuple[float, float] | None):
    """Bounds on the margins, and the margins at the centre, where attacks end, and at `rays`.

    In `u = (x - center) / eps` the set is the unit ball, for one eps and for one per feature.
    Clipped points are nearer to the centre, which is in the range.
    """
    model = BY_NAME[name]

    @on_host
    def run(weights, center, eps, starts, rays):
        function = functools.partial(model.flat, weights)
        rows, ball = margin_rows(function(center)), bj.LpBall(center, eps, p=2, clip=clip)

        def margins(u):
            x = center + eps * u
            return rows @ function(x if clip is None else jnp.clip(x, *clip))

        def attack(index, start):
            def step(u, size):
                slope = jax.grad(lambda u: margins(u)[index])(u)
                length = jnp.linalg.norm(slope)
                u = u - size * slope / jnp.where(length > 0, length, 1.0)
                u = u / jnp.maximum(jnp.linalg.norm(u), 1.0)
                return u, margins(u)[index]

            return jax.lax.scan(step, start, jnp.geomspace(0.5, 0.01, 30))[1].min()

        over_starts = jax.vmap(attack, in_axes=(None, 0))
        attacked = jax.vmap(over_starts, in_axes=(0, None))(jnp.arange(len(rows)), starts)
        bounds = {m: METHODS[m](function)(ball, rows) for m in ("bcp", "lmt", "crown")}
        return bounds, margins(jnp.zeros_like(center)), attacked.min(1), jax.vmap(margins)(rays)

    return run


@pytest.mark.parametrize(("name", "clip"), [("mlp", CLIP), ("cnn", None)])
@pytest.mark.sampled(3)
def test_no_attack_and_no_point_of_the_sphere_passes_a_bound(name, clip):
    model = BY_NAME[name]
    successes = []
    for seed, scale, per_feature in itertools.product(range(3), (0.05, 0.5, 3.0), (False, True)):
        rng = np.random.default_rng(seed)
        center = rng.uniform(*CLIP, size=model.input_shape)
        eps = np.full(center.shape, scale)
        if per_feature:  # an ellipsoid, flat in some directions
            eps = eps * rng.uniform(size=eps.shape) * (rng.uniform(size=eps.shape) < 0.8)
        rays = sphere(rng, 2000, center.size).reshape(-1, *center.shape)
        with jax.enable_x64(True):
            bounds, values, attacked, sampled = bounds_and_values(name, clip)(
                model.weights(seed, np.float64), center, eps, rays[:4], rays
            )
        successes.append(attacked < values)
        least = np.minimum(attacked, sampled.min(0))
        for method, (lower, upper) in bounds.items():
            slack = 1e-9 * (1 + np.abs(least))
            within = np.isfinite(lower) & (lower <= least + slack)
            assert within.all(), (method, seed, scale, per_feature)
            assert (upper >= sampled.max(0) - slack).all(), (method, seed, scale, per_feature)
    assert np.mean(successes) > 0.9  # an attack that rarely succeeds would test nothing


# ------------------------------------------------------------------ degenerate sets and networks


def test_a_ball_of_radius_0_gives_the_margins_themselves():
    for seed, clip in itertools.product(range(NETS), (None, CLIP)):
        layers, center = draw(seed, (3, 4, 4, 3))
        with jax.enable_x64(True):
            rows, bounds = margins_of(("bcp", "lmt"), clip)(layers, center, 0.0)
        exact = rows @ forward(layers, center)
        for end in (*bounds["bcp"], *bounds["lmt"]):
            np.testing.assert_allclose(end, exact, rtol=1e-12, atol=1e-12)


def test_a_batch_of_one_with_a_single_row():
    row = np.array([[1.0, -1.0, 0.0]])

    @on_host
    def run(layers, xs, rows):
        def bounds(x, rows, box):
            transform = bj.lipschitz(functools.partial(network, layers), box=box)
            return transform(bj.LpBall(x, EPS, p=2), rows).lower

        of = [functools.partial(bounds, box=box) for box in (True, False)]
        return [jax.vmap(f)(xs, rows) for f in of], [f(xs[0], rows[0]) for f in of]

    for seed in range(NETS):
        layers, center = draw(seed, (3, 4, 4, 3))
        with jax.enable_x64(True):
            batches, alone = run(layers, center[None], row[None])
        exact = exact_minima(layers, center, EPS, row)
        for batch, single in zip(batches, alone, strict=True):
            assert batch.shape == (1, 1)
            np.testing.assert_allclose(batch[0], single, rtol=1e-12)
            assert (single <= exact + 1e-9).all()


def test_a_huge_ball_has_finite_bounds_that_hold():
    for seed in range(NETS):
        layers, center = draw(seed, (3, 4, 4, 3))
        with jax.enable_x64(True):
            rows, bounds = margins_of(("bcp", "lmt"), None)(layers, center, 1e4)
        exact = exact_minima(layers, center, 1e4, rows)
        for lower, _ in bounds.values():
            assert (np.isfinite(lower) & (lower <= exact + 1e-9 * np.abs(exact))).all()


@pytest.mark.parametrize("layer", [0, 1])
def test_dead_units_give_the_constant_that_is_left(layer):
    for seed, clip in itertools.product(range(NETS), (None, CLIP)):
        layers, center = draw(seed, (3, 4, 4, 3))
        if layer == 0:  # just dead on the ball, but not on the box around it
            kernel, reach = layers[0][0], EPS * np.linalg.norm(layers[0][0], axis=0)
            layers[0] = kernel, -center @ kernel - reach - 1e-9
        else:
            layers[1] = layers[1][0], np.full(4, -100.0)
        with jax.enable_x64(True):
            rows, bounds = margins_of(("bcp", "lmt"), clip)(layers, center, EPS)
        exact = rows @ forward(layers, center)
        for end in bounds["bcp"]:
            np.testing.assert_allclose(end, exact, rtol=1e-12, atol=1e-12)


WIDTH, BATCH = 128, 16


def temporary_bytes(classes: int, training: bool) -> int:
    """Memory of a batch's margins, or of the robust loss's gradient in the weights; float32."""
    # Compiling needs the shapes only; nothing runs.
    layers = [(jnp.ones(s), jnp.zeros(s[1])) for s in ((64, WIDTH), (WIDTH, classes))]
    xs, labels = jnp.ones((BATCH, 64)), jnp.arange(BATCH, dtype=jnp.int32)

    def margins(layers, xs):
        function = functools.partial(network, layers)
        # The norms depend on the weights alone, so they are computed once, not once per example.
        first, last = (jnp.linalg.norm(kernel) for kernel, _ in layers)
        norms = {"dot_general": first, "dot_general_1": last}
        bounds = bj.lipschitz(function, norms=norms)

        def one(x, label):
            rows = bj.margin_specification(label, classes)
            return bounds(bj.LpBall(x, 0.1, p=2), rows).lower

        return jax.vmap(one)(xs, labels)

    def loss(layers, xs):
        return robust_cross_entropy(margins(layers, xs)).mean()

    compiled = jax.jit(jax.grad(loss) if training else margins).lower(layers, xs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.sampled(3)
def test_the_last_step_takes_classes_times_width_for_an_example(training):
    few, many = (temporary_bytes(classes, training) for classes in (100, 200))
    # A few arrays with one row per class and example, among them the specification.
    assert many <= (16 if training else 10) * 200 * WIDTH * BATCH * 4
    assert many < 2.6 * few
