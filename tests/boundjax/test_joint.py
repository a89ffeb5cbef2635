"""Joint ops on their own: image and planes on boxes of every kind against dense samples."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from compiled import on_host
from joint_nodes import (
    JOINT,
    boxes,
    default_position,
    joint_node,
    log_softmax,
    logsumexp,
    normalize,
    operands_of,
    reciprocal,
)
from networks import points

import boundjax as bj
from boundjax.ir.families import Planes
from boundjax.ops import product


def random_position(key):
    """Uniform random positions, drawn anew for every free plane."""

    def position(lower, upper, default):
        nonlocal key
        assert default.shape == lower.shape
        assert default.dtype == lower.dtype
        key, now = jax.random.split(key)
        return jax.random.uniform(now, lower.shape, lower.dtype)

    return position


def evaluated(node):
    """Compiled `(intervals, values, key) -> image, outputs, planes`, for two choices of planes."""

    def at(planes, values):
        below = jax.vmap(lambda *v: planes.product(planes.lower_weights, *v))(*values)
        above = jax.vmap(lambda *v: planes.product(planes.upper_weights, *v))(*values)
        return below + planes.lower_offset[None], above + planes.upper_offset[None]

    @on_host
    def run(intervals, values, key):
        positions = default_position, random_position(key)
        planes = [at(node.op.planes(node, *intervals, position=p), values) for p in positions]
        return node.op.image(node, *intervals), jax.vmap(node.apply)(*values), planes

    return run


def check(facts, node, slack, case=""):
    """Image and planes contain the values at sampled operands."""
    image, outputs, planes = facts
    for end in image:
        assert end.dtype == node.dtype
        assert end.shape == node.shape
        assert np.isfinite(end).all()
    assert (outputs >= image.lower - slack).all(), case
    assert (outputs <= image.upper + slack).all(), case
    for below, above in planes:
        assert below.dtype == above.dtype == node.dtype
        assert (below <= outputs + slack).all(), (case, (below - outputs).max())
        assert (above >= outputs - slack).all(), (case, (outputs - above).max())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", JOINT)
@pytest.mark.sampled(4)
def test_image_and_planes_contain_samples(name, dtype):
    function, *shapes = JOINT[name]
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == np.float64):
        node = joint_node(function, *shapes, dtype=dtype)
        run = evaluated(node)
        size = sum(int(np.prod(s.shape)) for s in node.input_shapes)
        for k, (kind, lower, upper) in enumerate(boxes(rng, size, dtype)):
            lower, upper = lower.astype(dtype), upper.astype(dtype)
            values = operands_of(node, points(rng, lower, upper, 300))
            intervals = list(map(bj.Interval, operands_of(node, lower), operands_of(node, upper)))
            scale = max(1.0, float(np.abs([lower, upper]).max()))
            terms = 4 * (scale**2 if node.primitive in ("mul", "dot_general") else scale)
            slack = terms * (1e-6 if dtype == np.float32 else 1e-14)
            result = run(intervals, values, jax.random.key(k))
            check(result, node, slack, kind)
            if kind in ("degenerate", "all zero"):
                image, _, planes = result
                assert (image.width <= 20 * slack).all()
                for below, above in planes:
                    assert (above - below <= 20 * slack).all()


@pytest.mark.parametrize("name", ["mul", "mul by a scalar", "log_softmax", "logsumexp of planes"])
def test_images_are_attained_at_corners(name):
    """The image of one element is its least and largest value over all corners."""
    function, *shapes = JOINT[name]
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        node = joint_node(function, *shapes)
        run = on_host(lambda x, corners: (node.op.image(node, *x), jax.vmap(node.apply)(*corners)))
        size = min(12, sum(int(np.prod(s.shape)) for s in node.input_shapes))
        choices = np.array(list(itertools.product((0, 1), repeat=size)))
        for kind, lower, upper in boxes(rng, size, np.float64):
            corners = operands_of(node, np.where(choices == 1, upper, lower))
            intervals = list(map(bj.Interval, operands_of(node, lower), operands_of(node, upper)))
            image, outputs = run(intervals, corners)
            tolerance = {"rtol": 1e-11, "atol": 1e-11}
            np.testing.assert_allclose(image.lower, outputs.min(0), **tolerance, err_msg=kind)
            np.testing.assert_allclose(image.upper, outputs.max(0), **tolerance, err_msg=kind)


def test_the_image_of_a_matrix_product_is_attained(monkeypatch):
    """Every term reaches its own corner; the fallback for large products is wider but sound."""
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        node = joint_node(lambda x, y: x @ y, (1, 3), (3, 1))
        choices = np.array(list(itertools.product((0, 1), repeat=6)))

        @on_host
        def run(intervals, corners):
            image = node.op.image(node, *intervals)
            monkeypatch.setattr(product, "_EXACT_TERMS", 0)
            loose = node.op.image(node, *intervals)
            monkeypatch.undo()
            return image, loose, jax.vmap(node.apply)(*corners)

        for kind, lower, upper in boxes(rng, 6, np.float64):
            corners = operands_of(node, np.where(choices, upper, lower))
            ends = operands_of(node, lower), operands_of(node, upper)
            image, loose, outputs = run(list(map(bj.Interval, *ends)), corners)
            tolerance = 1e-12 * max(1.0, np.abs(outputs).max())
            np.testing.assert_allclose(image.lower, outputs.min(0), atol=tolerance, err_msg=kind)
            np.testing.assert_allclose(image.upper, outputs.max(0), atol=tolerance, err_msg=kind)
            assert (loose.lower <= image.lower + tolerance).all()
            assert (loose.upper >= image.upper - tolerance).all()
            assert (loose.width <= 1.5 * image.width + 20 * tolerance).all(), kind


def test_planes_of_the_default_are_parallel():
    """Parallel planes halve the work of a walk; at other positions planes are not parallel."""
    for name in ("mul", "matmul"):
        function, *shapes = JOINT[name]
        node = joint_node(function, *shapes, dtype=np.float32)
        intervals = [
            bj.Interval(-jnp.ones(s.shape), 2 * jnp.ones(s.shape)) for s in node.input_shapes
        ]
        planes = node.op.planes(node, *intervals, position=default_position)
        assert isinstance(planes, Planes)
        assert planes.lower_weights is planes.upper_weights
        moved = node.op.planes(node, *intervals, position=lambda low, up, d: 0.25 + 0 * d)
        assert moved.lower_weights is not moved.upper_weights


def test_the_product_of_planes_is_linear_and_grows_with_the_operands():
    """The forward walk relies on this when it splits weights by sign."""
    with jax.enable_x64(True):
        for name, (function, *shapes) in JOINT.items():
            for both, apart, rise in products_of_planes(joint_node(function, *shapes)):
                np.testing.assert_allclose(both, apart, atol=1e-9, err_msg=name)
                assert (rise >= -1e-12).all(), name


def products_of_planes(node):
    """Of `2 u - w` at once and in parts, and the rise of `|w|`; `w` of the planes, `u` random."""
    rng = np.random.default_rng(10)
    low = [rng.normal(size=s.shape) for s in node.input_shapes]
    high = [x + rng.uniform(size=x.shape) for x in low]

    @on_host
    def run(low, high):
        intervals = list(map(bj.Interval, low, high))
        planes = node.op.planes(
            node, *intervals, position=lambda low, up, d: jnp.full_like(low, 0.3)
        )
        for weights in (planes.lower_weights, planes.upper_weights):
            first = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), weights)
            both = jax.tree.map(lambda a, b: 2 * a - b, first, weights)
            apart = 2 * planes.product(first, *low) - planes.product(weights, *low)
            positive = jax.tree.map(jnp.abs, weights)
            rise = planes.product(positive, *high) - planes.product(positive, *low)
            result.append((planes.product(both, *low), apart, rise))
        return result

    result = []
    return run(low, high)


# --- how tight the planes are ---------------------------------------------------------------------


def lowest_plane_above(function, lower, upper):
    """The least value at the middle of any plane that is above at all vertices (convex: above)."""
    choices = np.array(list(itertools.product((0, 1), repeat=lower.size)))
    vertices = np.where(choices, upper, lower)
    values = np.array([float(function(v)) for v in vertices])
    # The concave envelope: the largest weighted mean of the values at vertices around the middle.
    equal = np.concatenate([vertices.T, np.ones((1, len(vertices)))])
    bounds = scipy.optimize.linprog(-values, A_eq=equal, b_eq=[*(0.5 * (lower + upper)), 1.0])
    return -bounds.fun


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_plane_above_logsumexp_is_close_to_the_best(count):
    rng = np.random.default_rng(count)
    with jax.enable_x64(True):
        node = joint_node(logsumexp, (count,))

        @jax.jit
        def at_middle(lower, upper):
            planes = node.op.planes(node, bj.Interval(lower, upper), position=default_position)
            middle = 0.5 * (lower + upper)
            return planes.product(planes.upper_weights, middle) + planes.upper_offset

        gaps, optimal = [], 0
        for _ in range(60):
            centre = rng.normal(size=count) * rng.choice([0.3, 3.0])
            radius = rng.uniform(0, rng.choice([0.1, 1.0, 5.0]), size=count)
            lower, upper = centre - radius, centre + radius
            best = lowest_plane_above(scipy.special.logsumexp, lower, upper)
            ours = float(at_middle(lower, upper))
            assert ours >= best - 1e-9
            growth = np.exp(upper) - np.exp(lower)
            if growth.max() >= growth.sum() / 2:
                optimal += 1
                assert ours <= best + 2e-6  # the tolerance is the threshold for narrow intervals
            gaps.append((ours - best) / (best - scipy.special.logsumexp(centre)))
        assert optimal >= 10
        assert optimal == 60 or count > 2
        assert np.mean(gaps) <= 0.05
        assert np.max(gaps) <= 0.5


def test_products_of_mccormick_are_the_envelopes():
    """Planes are optimal at the middle, and exact at two corners at positions 0 and 1."""
    x, y = bj.Interval(jnp.array(-1.0), jnp.array(2.0)), bj.Interval(jnp.array(0.5), jnp.array(3.0))
    for position, corners in ((0.0, [(-1, 0.5), (-1, 3), (2, 0.5)]), (1.0, [(2, 3), (-1, 3)])):
        planes = product.product_planes(x, y, lambda low, up, d, p=position: jnp.full_like(d, p))
        for a, b in corners:
            value = planes.product(planes.lower_weights, jnp.array(a), jnp.array(b))
            np.testing.assert_allclose(value + planes.lower_offset, a * b, atol=2e-5)
    planes = product.product_planes(x, y, default_position)
    assert planes.lower_weights is planes.upper_weights
    middle = planes.product(planes.lower_weights, x.middle, y.middle)
    np.testing.assert_allclose(middle + planes.lower_offset, 0.5 * 1.75 - 1.5 * 1.25, atol=2e-5)
    np.testing.assert_allclose(middle + planes.upper_offset, 0.5 * 1.75 + 1.5 * 1.25, atol=2e-5)


# --- numbers that are not finite ------------------------------------------------------------------


def test_zero_times_infinity_is_unknown_and_nan_stays():
    inf, nan = jnp.inf, jnp.nan
    x = bj.Interval(jnp.array([0.0, 1.0, nan, 0.0]), jnp.array([0.0, 2.0, 1.0, 1.0]))
    y = bj.Interval(jnp.array([-inf, 1.0, 0.0, nan]), jnp.array([inf, inf, 1.0, 1.0]))
    bounds = product.corner_products(x, y)
    np.testing.assert_array_equal(bounds.lower, [-inf, 1.0, nan, nan])
    np.testing.assert_array_equal(bounds.upper, [inf, inf, nan, nan])
    planes = product.product_planes(x, y, default_position)
    np.testing.assert_array_equal(planes.lower_offset, [-inf, 1.0, nan, nan])
    np.testing.assert_array_equal(planes.upper_offset, [inf, inf, nan, nan])
    assert (planes.lower_weights[0][:2] == 0).all()


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.sampled(4)
def test_nan_ends_give_no_number(name):
    function, *shapes = JOINT[name]
    node = joint_node(function, *shapes, dtype=np.float32)
    ends = [(jnp.full(s.shape, jnp.nan), jnp.ones(s.shape)) for s in node.input_shapes]

    @on_host
    def run(ends):
        poisoned = [bj.Interval(lower, lower) for lower, _ in ends]
        planes = node.op.planes(node, *poisoned, position=default_position)
        offsets = planes.lower_offset, planes.upper_offset
        return *node.op.image(node, *(bj.Interval(*pair) for pair in ends)), *offsets

    for result in run(ends):
        assert np.isnan(result).all()


def test_masked_entries_of_a_softmax_do_not_matter(optimized):
    least = float(jnp.finfo(jnp.float32).min)
    node = joint_node(log_softmax, (4,), dtype=np.float32)
    free = joint_node(log_softmax, (2,), dtype=np.float32)
    for mask in (least, -jnp.inf):
        lower, upper = jnp.array([0.0, mask, -1.0, mask]), jnp.array([1.0, mask, 2.0, mask])
        kept = jnp.array([0, 2])
        whole, part = bj.Interval(lower, upper), bj.Interval(lower[kept], upper[kept])
        one = jnp.full(4, mask).at[1].set(0.5)
        alone = bj.Interval(one, one)
        image, expected, single = jax.jit(
            lambda a, b, c: (node.op.image(node, a), free.op.image(free, b), node.op.image(node, c))
        )(whole, part, alone)
        np.testing.assert_allclose([end[1] for end in single], 0, atol=1e-5)
        for ours, theirs in zip(image, expected, strict=True):
            np.testing.assert_allclose(ours[kept], theirs, rtol=1e-6)
            assert (np.exp(ours[jnp.array([1, 3])]) == 0).all()

    @on_host
    def planes(whole, part):
        return [
            n.op.planes(n, x, position=default_position)[1:]
            for n, x in ((node, whole), (free, part))
        ]

    for mask in (least, -jnp.inf):
        lower, upper = jnp.array([0.0, mask, -1.0, mask]), jnp.array([1.0, mask, 2.0, mask])
        bounds = planes(bj.Interval(lower, upper), part)
        for mine, other in zip(*map(jax.tree.leaves, bounds), strict=True):
            assert np.isfinite(mine).all()
            np.testing.assert_allclose(mine[kept], other, rtol=1e-5, atol=1e-5)


# --- normalisation --------------------------------------------------------------------------------


def reciprocal_interval(lower, upper, axes, eps):
    """The interval of r by interval propagation."""
    least = np.maximum(np.maximum(lower, -upper), 0.0)
    most = np.maximum(np.abs(lower), np.abs(upper))
    with np.errstate(divide="ignore"):
        ends = [1 / np.sqrt(np.mean(end**2, axes, keepdims=True) + eps) for end in (most, least)]
    widened = zip(ends, (1 - 1e-6, 1 + 1e-6), strict=True)
    ends = [np.broadcast_to(e * f, lower.shape).astype(lower.dtype) for e, f in widened]
    return bj.Interval(*map(jnp.asarray, ends))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("shape", "axes", "eps"),
    [((4,), (0,), 1e-5), ((2, 3, 2), (0, 2), 1e-3), ((3, 1), (-1,), 1e-5), ((3,), (0,), 0.0)],
)
@pytest.mark.sampled(4)
def test_normalize_contains_samples(shape, axes, eps, dtype):
    rng = np.random.default_rng(3)
    with jax.enable_x64(dtype == np.float64):
        node = joint_node(lambda d, r: normalize(d, r, axes, eps), shape, shape, dtype=dtype)
        run = evaluated(node)
        reciprocals = jax.jit(jax.vmap(lambda v: reciprocal(v, axes, eps)))
        count = int(np.prod([shape[axis] for axis in axes]))
        for k, (kind, lower, upper) in enumerate(boxes(rng, int(np.prod(shape)), dtype)):
            lower, upper = (end.astype(dtype).reshape(shape) for end in (lower, upper))
            if eps == 0.0 and (lower <= 0).all() and (upper >= 0).all():
                continue  # not defined at 0, so there are no bounds
            d = jnp.asarray(points(rng, lower, upper, 400))
            interval = bj.Interval(jnp.asarray(lower), jnp.asarray(upper))
            intervals = [interval, reciprocal_interval(lower, upper, axes, eps)]
            r = reciprocals(d)
            result = run(intervals, [d, r], jax.random.key(k))
            # Terms of the planes grow with the ends of both operands, up to 1e3 / sqrt(eps).
            size = np.abs([lower, upper]).max() * np.nan_to_num(intervals[1].upper, posinf=0).max()
            check(result, node, (1 + size) * (3e-5 if dtype == np.float32 else 1e-12), kind)
            tight = 3e-5 if dtype == np.float32 else 1e-12
            assert (result[1] >= result[0].lower - tight).all(), kind
            assert (result[1] <= result[0].upper + tight).all(), kind
            for end in result[0]:
                assert (np.abs(end) <= np.sqrt(count) * (1 + 1e-5)).all(), kind


def test_normalize_is_tighter_than_the_product_and_exact_for_one_free_element():
    """With `d_0` alone perturbed, the joint formula is a monotone function of it."""
    with jax.enable_x64(True):
        lower, upper = np.array([-1.0, 0.5, -2.0]), np.array([3.0, 0.5, -2.0])
        node = joint_node(normalize, (3,), (3,))
        intervals = bj.Interval(lower, upper), reciprocal_interval(lower, upper, (0,), 1e-5)
        image = jax.jit(functools.partial(node.op.image, node))(*intervals)
        ends = [d * reciprocal(jnp.asarray(d), (0,), 1e-5) for d in (lower, upper)]
        np.testing.assert_allclose(
            (image.lower[0], image.upper[0]), [e[0] for e in ends], rtol=1e-9
        )
        assert image.width[0] < 0.7 * product.corner_products(*intervals).width[0]


def test_normalize_of_large_and_small_values_is_finite():
    node = joint_node(normalize, (3,), (3,), dtype=np.float32)
    run = on_host(functools.partial(node.op.image, node))
    for scale in (1e-30, 1e-20, 1.0, 1e18, 1e25):
        lower, upper = np.float32([[-1.0, 1.0, 2.0], [1.0, 2.0, 2.0]]) * np.float32(scale)
        r = bj.Interval(np.zeros(3, np.float32), np.full(3, 400.0, np.float32))
        image = run(bj.Interval(lower, upper), r)
        d = np.asarray(upper, np.float64)
        value = d / np.sqrt(np.mean(d**2) + 1e-5)
        assert np.isfinite(image.upper).all()
        assert (image.upper >= value * (1 - 1e-6)).all()
        assert (image.lower <= value * (1 + 1e-6)).all()
